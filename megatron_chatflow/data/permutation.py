"""The order of a source's samples within an epoch: shuffled, without a shuffle index.

In: the run's seed, the source's name, the epoch. Out: for each place in the epoch the sample that
stands there. Nothing else matters to the order: not the number of ranks, nor where a run resumed.
"""

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from megatron_chatflow.native.permutation import NUM_ROUNDS, permute, permute_one

_PERSON = b"chatflow order 1"  # blake2b's personalisation, at most 16 bytes; versions the keys
_KEYS_PER_DIGEST = 8


def round_keys(seed: int, source: str, epoch: int) -> npt.NDArray[np.uint64]:
    """Derives the keys of one epoch's permutation.

    Args:
        seed: The run's seed; any integer of 64 bits.
        source: Name of the source.
        epoch: 0 for the first pass over the source.

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
    """The order in which a source's samples are drawn, epoch after epoch.

    The ``index``-th draw of a source of ``num_samples`` samples is place ``index % num_samples`` of
    epoch ``index // num_samples``; each epoch is a permutation of its own of all samples.
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
        """Fixes the order.

        Args:
            seed: The run's seed.
            source: Name of the source.
            num_samples: In one epoch, at least 1.
            shuffle: False keeps the samples in their own order (validation).
            later_seeds: Seeds that replace it: the first epoch of each, rising, and the seed.
        """
        if num_samples < 1:
            raise ValueError(f"order of source {source}: num_samples is {num_samples}")
        self.num_samples = num_samples
        self._seeds = [(0, seed), *later_seeds]
        self._source = source
        self._shuffle = shuffle
        # Neighbouring draws share an epoch; the cache is safe to ask from several threads.
        self._keys_of = lru_cache(maxsize=4)(self._derive)

    def _derive(self, epoch: int) -> npt.NDArray[np.uint64]:
        seed = next(seed for first, seed in reversed(self._seeds) if first <= epoch)
        return round_keys(seed, self._source, epoch)

    def ordinal(self, index: int) -> int:
        """Returns the sample, in [0, num_samples), that the ``index``-th draw gives."""
        epoch, place = divmod(index, self.num_samples)
        if index < 0:
            raise ValueError(f"order of source {self._source}: index {index} is negative")
        if not self._shuffle:
            return place
        return permute_one(place, self.num_samples, self._keys_of(epoch))

    def ordinals(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns the samples of many draws.

        Args:
            indices: int64[n], draws of this source, none negative.

        Returns:
            int64[n], each in [0, num_samples).
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
