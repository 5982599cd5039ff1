"""The cosine ramp as a frozen table of integers, so that it is the same on every machine.

In: nothing. Out: `COSINE_PORTIONS`, how far a cosine ramp has come after each of its equal chords.

The values are ``round(2**32 * (1 - cos(pi * j / 64)) / 2)``, computed once with 60 digits. They are
written down because the cosine of a C library may differ in the last bit from one machine to the
next. The chords are the schedule: between two values a ramp is linear. They stay within
``1.5e-4`` of the true cosine times the change of weight, and agree with it at both ends.
"""

NUM_CHORDS = 64

_FIRST_HALF = (
    0,
    2586738,
    10340721,
    23243268,
    41263296,
    64357394,
    92469925,
    125533164,
    163467459,
    206181423,
    253572154,
    305525484,
    361916252,
    422608608,
    487456340,
    556303222,
    628983398,
    705321774,
    785134444,
    868229132,
    954405657,
    1043456411,
    1135166864,
    1229316076,
    1325677235,
    1424018197,
    1524102050,
    1625687685,
    1728530372,
    1832382353,
    1936993442,
    2042111620,
    2147483648,
)

COSINE_PORTIONS = _FIRST_HALF + tuple((1 << 32) - portion for portion in _FIRST_HALF[-2::-1])
"""``NUM_CHORDS + 1`` integers from 0 to 2**32."""
