"""Samples of fixed length: windows over the tokens of a source, at a stride of ``seq_length``.

In: token files and the stretches that a split takes. Out: any window, read where it lies. Two
neighbouring windows share one token: the last label of one is the first input of the next.
"""

from collections.abc import Sequence

from megatron_chatflow.data.samples import Runs, Sample, SampleShape, TokenFile
from megatron_chatflow.native.samples import read_window_reference


class WindowReader:
    """Reads a source's windows.

    Attributes:
        num_samples: Windows in one epoch.
        num_tokens: Tokens in one epoch.
    """

    def __init__(
        self, files: Sequence[TokenFile], runs: Runs, shape: SampleShape, *, keep_tail: bool
    ) -> None:
        """Lays the windows; touches no token.

        Args:
            files: The token files.
            runs: What the split takes of them.
            shape: Of the samples.
            keep_tail: Whether tokens that fill no window make one with padding (validation, where
                every token counts) or are left out (training).
        """
        self._files = files
        self._runs = runs
        self._shape = shape
        self.num_tokens = int(runs.cumulative[-1])
        # The first token of all is no label.
        num_labels = max(self.num_tokens - 1, 0)
        self.num_samples = num_labels // shape.seq_length
        if keep_tail:
            self.num_samples = -(-num_labels // shape.seq_length)

    def read(self, ordinal: int) -> Sample:
        """Reads the ``ordinal``-th window.

        Raises:
            ValueError: There is none such, or it holds an id outside the vocabulary.
        """
        if not 0 <= ordinal < self.num_samples:
            raise ValueError(f"sample {ordinal} is not one of {self.num_samples}")
        return read_window_reference(self._files, self._runs, self._shape, ordinal)
