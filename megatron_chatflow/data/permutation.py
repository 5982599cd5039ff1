"""Shuffles the samples of a source in every epoch without a shuffle index.

`SampleOrder` maps each place of an epoch to a sample by a keyed permutation of 0 .. size - 1. The
keys depend only on the run's seed, the source's name and the epoch. No index is stored, so the cost
does not depend on the size of the epoch.

The permutation is a Feistel network on a product domain with cycle walking (Black and Rogaway,
"Ciphers with Arbitrary Finite Domains", CT-RSA 2002). Its definition follows, in wrapping unsigned
64-bit arithmetic, which the C++ version and the reference follow bit for bit::

    rows    = ceil(sqrt(size))
    columns = ceil(size / rows), made even by adding 1 if necessary
    encrypt(x):
        left, right = x div columns, x mod columns
        for round r = 0 .. 15:
            even r:  left  = (left  + reduce(mix(right, key[r]), rows))    mod rows
            odd r:   right = (right + reduce(mix(left,  key[r]), columns)) mod columns
        return left * columns + right
    permute(x): x = encrypt(x), repeated while x >= size

    mix(v, key): z = v * 0x9E3779B97F4A7C15 + key           (one SplitMix64 step: Steele, Lea and
                 z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9    Flood, OOPSLA 2014)
                 z = (z ^ (z >> 27)) * 0x94D049BB133111EB
                 return z ^ (z >> 31)
    reduce(z, m) = ((z >> 32) * m) >> 32

``rows * columns - size < 2 * rows``, so a walk of more than one step is rare, about
``2 * size ** -0.5``. With 16 rounds, all ``size!`` orders of 2 to 7 elements are equally likely
within the resolution of 400,000 random keys. 8 rounds are not enough. Neither are odd
columns, because rounds that shift an odd number of cells are even permutations.
"""

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from math import isqrt

import numpy as np
import numpy.typing as npt

from megatron_chatflow.runtime import load_extension

extension = load_extension("data")


NUM_ROUNDS = 16
"""Number of rounds of the Feistel network, and of round keys."""

MAX_SIZE = 1 << 62
"""Largest domain. Both halves are below 2^32 up to this size, as ``reduce`` requires."""

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB

_PERSON = b"chatflow order 1"  # blake2b's personalisation, at most 16 bytes; versions the keys
_KEYS_PER_DIGEST = 8


def domain_shape(size: int) -> tuple[int, int]:
    """Returns the rows and columns of a near-square rectangle with at least ``size`` cells.

    Raises:
        ValueError: ``size`` is not between 1 and 2^62.
    """
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"permutation: size {size} is not between 1 and 2^62")
    rows = isqrt(size - 1) + 1
    columns = -(-size // rows)
    return rows, columns + columns % 2


def permute_reference(
    places: npt.NDArray[np.int64], size: int, keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.int64]:
    """Permutes places, int64[n] in [0, size), with 16 round keys, uint64[16].

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


def _permute_one(place: int, size: int, keys: npt.NDArray[np.uint64]) -> int:
    return int(permute_reference(np.array([place]), size, keys)[0])


if extension is None:
    permute, permute_one = permute_reference, _permute_one
else:
    permute, permute_one = extension.permute, extension.permute_one


def round_keys(seed: int, source: str, epoch: int) -> npt.NDArray[np.uint64]:
    """Derives the keys of one epoch's permutation from the run's seed, a signed 64-bit integer.

    Returns:
        uint64[16]: two blake2b-512 digests, salted 0 and 1, read as little-endian words.
    """
    message = seed.to_bytes(8, "little", signed=True) + epoch.to_bytes(8, "little")
    message += source.encode()
    digests = b"".join(
        blake2b(message, person=_PERSON, salt=bytes([number])).digest()
        for number in range(NUM_ROUNDS // _KEYS_PER_DIGEST)
    )
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


class SampleOrder:
    """The order in which a source's samples are drawn.

    The ``index``-th draw is place ``index % num_samples`` of epoch ``index // num_samples``. Every
    epoch is a different permutation of all samples.
    """

    def __init__(
        self,
        seed: int,
        source: str,
        num_samples: int,
        *,
        shuffle: bool = True,
        later_seeds: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Initializes the order. Without shuffling, as for validation, it is that of the file.

        ``later_seeds`` are pairs ``(first_epoch, seed)`` in ascending order of epochs. Each seed
        replaces the previous one from its first epoch on.

        Raises:
            ValueError: ``num_samples`` is below 1.
        """
        if num_samples < 1:
            raise ValueError(f"order of source {source}: num_samples is {num_samples}")
        self.num_samples = num_samples
        self._seeds = [(0, seed), *later_seeds]
        self._source = source
        self._shuffle = shuffle
        # Consecutive draws are usually in the same epoch. `lru_cache` is thread-safe.
        self._keys_of = lru_cache(maxsize=4)(self._derive)

    def _derive(self, epoch: int) -> npt.NDArray[np.uint64]:
        seed = next(seed for first, seed in reversed(self._seeds) if first <= epoch)
        return round_keys(seed, self._source, epoch)

    def ordinal(self, index: int) -> int:
        """Returns the sample of the ``index``-th draw, in [0, num_samples).

        Raises:
            ValueError: ``index`` is negative.
        """
        epoch, place = divmod(index, self.num_samples)
        if index < 0:
            raise ValueError(f"order of source {self._source}: index {index} is negative")
        if not self._shuffle:
            return place
        return permute_one(place, self.num_samples, self._keys_of(epoch))

    def ordinals(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns the samples of many draws, int64[n] each, in [0, num_samples).

        Raises:
            ValueError: An index is negative.
        """
        if indices.size and int(indices.min()) < 0:
            raise ValueError(f"order of source {self._source}: an index is negative")
        epochs, places = np.divmod(indices, self.num_samples)
        if not self._shuffle:
            return places
        ordinals = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            ordinals[chosen] = permute(places[chosen], self.num_samples, self._keys_of(epoch))
        return ordinals
