"""A keyed permutation of 0..size-1 that needs no memory: reference and compiled function.

In: places, the size of the domain, sixteen 64-bit round keys. Out: where the permutation sends each
place. Nothing is stored, so an epoch of 10^12 samples costs what one of ten does.

The construction is a Feistel network on a product domain with cycle walking (Black and Rogaway,
"Ciphers with Arbitrary Finite Domains", CT-RSA 2002). The definition, in unsigned 64-bit
arithmetic that wraps, which every implementation equals bit for bit::

    rows    = ceil(sqrt(size))
    columns = ceil(size / rows), made even by adding 1 if need be
    encrypt(x):
        left, right = x div columns, x mod columns
        for round r = 0 .. 15:
            even r:  left  = (left  + reduce(mix(right, key[r]), rows))    mod rows
            odd r:   right = (right + reduce(mix(left,  key[r]), columns)) mod columns
        return left * columns + right
    permute(x): x = encrypt(x), again while x >= size

    mix(v, key): z = v * 0x9E3779B97F4A7C15 + key           (one SplitMix64 step: Steele, Lea and
                 z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9    Flood, OOPSLA 2014)
                 z = (z ^ (z >> 27)) * 0x94D049BB133111EB
                 return z ^ (z >> 31)
    reduce(z, m) = ((z >> 32) * m) >> 32

``rows * columns - size < 2 * rows``, so a walk of more than one step is rare, about
``2 * size ** -0.5``. With 16 rounds every one of the ``size!`` orders of 2 to 7 elements is equally
likely within what 400,000 random keys resolve; 8 rounds are not enough, nor are odd columns (rounds
that shift an odd number of cells are even permutations).
"""

from math import isqrt

import numpy as np
import numpy.typing as npt

from megatron_chatflow.native.extension import extension

NUM_ROUNDS = 16
"""Rounds of the Feistel network, hence round keys."""

MAX_SIZE = 1 << 62
"""Largest domain: both halves then stay below 2^32, which ``reduce`` needs."""

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK_64 = (1 << 64) - 1


def domain_shape(size: int) -> tuple[int, int]:
    """Returns the rows and columns of the near-square rectangle that holds ``size``.

    Args:
        size: Number of elements, 1 to 2^62.

    Raises:
        ValueError: ``size`` is out of range.
    """
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"permutation: size {size} is not between 1 and 2^62")
    rows = isqrt(size - 1) + 1
    columns = -(-size // rows)
    return rows, columns + columns % 2


def permute_one_reference(place: int, size: int, keys: npt.NDArray[np.uint64]) -> int:
    """Sends one place through the permutation, in Python's integers.

    Args:
        place: 0 <= place < size.
        size: Number of elements.
        keys: uint64[16], the round keys.

    Returns:
        The image of ``place``, in [0, size).
    """
    rows, columns = domain_shape(size)
    if not 0 <= place < size:
        raise ValueError(f"permutation: place {place} is not in [0, {size})")
    round_keys = keys.tolist()
    while True:
        left, right = divmod(place, columns)
        for number, key in enumerate(round_keys):
            if number % 2 == 0:
                left = (left + _reduced(right, key, rows)) % rows
            else:
                right = (right + _reduced(left, key, columns)) % columns
        place = left * columns + right
        if place < size:
            return place


def _reduced(value: int, key: int, modulus: int) -> int:
    z = (value * _GOLDEN + key) & _MASK_64
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK_64
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK_64
    z ^= z >> 31
    return ((z >> 32) * modulus) >> 32


def permute_reference(
    places: npt.NDArray[np.int64], size: int, keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.int64]:
    """Sends many places through the permutation at once, in NumPy.

    Args:
        places: int64[n], each in [0, size).
        size: Number of elements.
        keys: uint64[16], the round keys.

    Returns:
        int64[n], the image of each place.

    Raises:
        ValueError: A place or the size is out of range.
    """
    rows, columns = domain_shape(size)
    if places.size and (int(places.min()) < 0 or int(places.max()) >= size):
        raise ValueError(f"permutation: a place is not in [0, {size})")
    images = _encrypt(places.astype(np.uint64), rows, columns, keys)
    outside = np.flatnonzero(images >= size)
    while outside.size:
        images[outside] = _encrypt(images[outside], rows, columns, keys)
        outside = outside[images[outside] >= size]
    return images.astype(np.int64)


def _encrypt(
    values: npt.NDArray[np.uint64], rows: int, columns: int, keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    left, right = np.divmod(values, np.uint64(columns))
    for number, key in enumerate(keys):
        if number % 2 == 0:
            left = (left + _reduce(_mix(right, key), rows)) % np.uint64(rows)
        else:
            right = (right + _reduce(_mix(left, key), columns)) % np.uint64(columns)
    return np.asarray(left * np.uint64(columns) + right, dtype=np.uint64)


def _mix(values: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    z = values * np.uint64(_GOLDEN) + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
    return z ^ (z >> np.uint64(31))


def _reduce(values: npt.NDArray[np.uint64], modulus: int) -> npt.NDArray[np.uint64]:
    return ((values >> np.uint64(32)) * np.uint64(modulus)) >> np.uint64(32)


if extension is None:
    permute, permute_one = permute_reference, permute_one_reference
else:
    permute, permute_one = extension.permute, extension.permute_one
