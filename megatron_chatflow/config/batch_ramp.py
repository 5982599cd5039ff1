"""A global batch size that grows over the first samples of a run, as in Megatron-LM.

``--rampup-batch-size START INCREMENT SAMPLES`` divides the first ``SAMPLES`` samples into equal
parts, one for each increment between ``START`` and ``--global-batch-size``. An iteration has the
size of the part in which it begins. Megatron-LM computes the parts in floating point; here they are
exact. The order of the samples depends on the schedule alone, so a ramp does not change it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class BatchSizes:
    """The global batch size by consumed samples."""

    full: int  # samples per iteration after the ramp
    start: int  # samples per iteration at the start of the run; ``full`` without a ramp
    increment: int  # samples by which an iteration grows
    ramp: int  # samples over which it grows

    @classmethod
    def of(cls, full: int, rampup: tuple[int, ...] | None) -> "BatchSizes":
        """Creates the sizes of a global batch size and the three numbers of a ramp."""
        return cls(full, full, 1, 1) if rampup is None else cls(full, *rampup)

    @property
    def num_increments(self) -> int:
        """Number of increments; 0 without a ramp."""
        return (self.full - self.start) // self.increment

    def levels(self) -> list[int]:
        """Returns every size, ascending."""
        return [self.start + k * self.increment for k in range(self.num_increments + 1)]

    def at(self, consumed_samples: int) -> int:
        """Returns the size of the iteration after ``consumed_samples``."""
        steps = consumed_samples * self.num_increments // self.ramp
        return min(self.start + steps * self.increment, self.full)

    def pieces(self, consumed_samples: int) -> list[tuple[int, int, int]]:
        """Divides the iterations after ``consumed_samples`` into pieces of constant size.

        Returns:
            ``(iteration, sample, size)`` of every piece, ascending: the number of iterations and
            the number of samples before it, the former counted from ``consumed_samples``, and its
            samples per iteration. The last piece is endless.
        """
        iteration, sample = 0, consumed_samples
        pieces = []
        while (size := self.at(sample)) < self.full:
            pieces.append((iteration, sample, size))
            level = (size - self.start) // self.increment
            # The first sample of the next part, and the first iteration that does not begin before.
            end = -(-(level + 1) * self.ramp // self.num_increments)
            num_iterations = -(-(end - sample) // size)
            iteration, sample = iteration + num_iterations, sample + num_iterations * size
        return [*pieces, (iteration, sample, self.full)]

    def samples_after(
        self, consumed_samples: int, iterations: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Returns the consumed samples, int64[n], after further ``iterations``, int64[n]."""
        first, samples, sizes = np.array(self.pieces(consumed_samples), np.int64).T
        piece = np.searchsorted(first, iterations, side="right") - 1
        result: npt.NDArray[np.int64] = samples[piece] + (iterations - first[piece]) * sizes[piece]
        return result

    def whole_iterations(self, consumed_samples: int, end: int) -> int:
        """Returns the number of iterations after ``consumed_samples`` that end by sample ``end``.

        ``samples_after(consumed_samples, n) <= end`` holds for this number n and not for n + 1.
        """
        pieces = [piece for piece in self.pieces(consumed_samples) if piece[1] <= end]
        if not pieces:
            return 0
        iteration, sample, size = pieces[-1]
        return iteration + (end - sample) // size
