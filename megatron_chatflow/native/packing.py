"""Best-fit-decreasing packing of documents into samples: the reference, and the compiled one.

Takes the lengths of documents and the room of a sample, and lists the documents of every sample.
The algorithm is offline best fit (Johnson, "Near-optimal bin packing algorithms", 1973; for
documents: Ding et al., "Fewer Truncations Improve Language Modeling", ICML 2024), made
deterministic:

- documents come longest first, equal ones in their own order;
- each goes to the sample with the least room that it fits in; of several, to the one that came to
  have that room last; to a new sample if it fits in none;
- samples are then numbered by their first document, so that their order is the corpus's own.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_chatflow.native.extension import extension

DocumentsOfSamples = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""int64[num_samples + 1], where each sample's documents begin in the list that follows; and
int64[num_packed], the documents of every sample, ascending."""


def best_fit_reference(lengths: npt.NDArray[Any], capacity: int) -> DocumentsOfSamples:
    """Packs documents into samples, none of which is cut.

    Args:
        lengths: Integers[num_documents], tokens in each document, 0 to ``capacity``. Empty
            documents are left out.
        capacity: Tokens that a sample holds.

    Returns:
        The documents of every sample. Samples are in the order of their first documents.

    Raises:
        ValueError: A length is negative or above the capacity.
    """
    samples = _assign(lengths, capacity)
    num_samples = int(samples.max(initial=-1)) + 1
    documents = np.argsort(samples, kind="stable")[np.count_nonzero(samples < 0) :]
    offsets = np.zeros(num_samples + 1, np.int64)
    offsets[1:] = np.cumsum(np.bincount(samples[documents], minlength=num_samples))
    return offsets, documents


def _assign(lengths: npt.NDArray[Any], capacity: int) -> npt.NDArray[np.int64]:
    """The sample of each document, int64[num_documents]; -1 for an empty one."""
    if lengths.size and (int(lengths.min()) < 0 or int(lengths.max()) > capacity):
        raise ValueError(f"packing: a length is not between 0 and {capacity}")
    samples = np.full(len(lengths), -1, np.int64)
    open_samples: list[list[int]] = [[] for _ in range(capacity + 1)]  # by room, latest last
    rooms = 0  # bit r is set where open_samples[r] holds any
    num_samples = 0
    for document in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        length = int(lengths[document])
        if length == 0:
            break
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            sample = open_samples[room].pop()
            if not open_samples[room]:
                rooms ^= 1 << room
        else:
            room, sample = capacity, num_samples
            num_samples += 1
        samples[document] = sample
        room -= length
        if room:
            open_samples[room].append(sample)
            rooms |= 1 << room
    return _in_order_of_first(samples, num_samples)


def _in_order_of_first(samples: npt.NDArray[np.int64], num_samples: int) -> npt.NDArray[np.int64]:
    """Numbers the samples anew, by the first document of each."""
    packed = np.flatnonzero(samples >= 0)
    _, first = np.unique(samples[packed], return_index=True)
    rank = np.empty(num_samples, np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(num_samples)
    renumbered = samples.copy()
    renumbered[packed] = rank[samples[packed]]
    return renumbered


def best_fit(lengths: npt.NDArray[Any], capacity: int) -> DocumentsOfSamples:
    """The compiled `best_fit_reference`, or the reference itself where nothing is compiled.

    ``lengths`` is int32, or int64 where the capacity or the number of documents needs it. It is
    overwritten: for a large corpus a second array of this size would not fit into memory.
    """
    if extension is None:
        return best_fit_reference(lengths, capacity)
    packed: DocumentsOfSamples = extension.best_fit(lengths, capacity)
    return packed
