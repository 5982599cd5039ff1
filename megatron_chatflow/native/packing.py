"""Best-fit-decreasing packing of documents into samples: the reference, and the compiled one.

In: lengths of documents, the room of a sample. Out: the sample of each document. The algorithm is
offline best fit (Johnson, "Near-optimal bin packing algorithms", 1973; for documents: Ding et al.,
"Fewer Truncations Improve Language Modeling", ICML 2024), made deterministic:

- documents come longest first, equal ones in their own order;
- each goes to the sample with the least room that it fits in; of several, to the one that came to
  have that room last; to a new sample if it fits in none;
- samples are then numbered by their first document, so that their order is the corpus's own.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_chatflow.native.extension import extension


def best_fit_reference(lengths: npt.NDArray[Any], capacity: int) -> npt.NDArray[np.int64]:
    """Packs documents into samples, none of which is cut.

    Args:
        lengths: Integers[num_documents], tokens in each document, 0 to ``capacity``.
        capacity: Tokens that a sample holds.

    Returns:
        int64[num_documents]: the sample of each document; -1 for an empty one. Samples are numbered
        0, 1, 2, ... in the order of their first documents.

    Raises:
        ValueError: A length is negative or above the capacity.
    """
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


def best_fit(lengths: npt.NDArray[np.int64], capacity: int) -> npt.NDArray[np.int64]:
    """The compiled `best_fit_reference`, or the reference itself where nothing is compiled."""
    if extension is None:
        return best_fit_reference(lengths, capacity)
    samples: npt.NDArray[np.int64] = extension.best_fit(lengths, capacity)
    return samples
