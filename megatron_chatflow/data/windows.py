"""Samples of fixed length: windows over the tokens of a source, at a stride of ``seq_length``.

In: token files and the stretches that a split takes. Out: any window, read where it lies. Two
neighbouring windows share one token: the last label of one is the first input of the next.
"""

from collections.abc import Sequence

from megatron_chatflow.native.samples import Runs, SampleShape, TokenFile, make_window_reader


class Windows:
    """The windows of a source.

    Attributes:
        num_samples: Windows in one epoch.
        num_tokens: Tokens in one epoch.
        rows: Reads any of them.
    """

    def __init__(
        self,
        label: str,
        files: Sequence[TokenFile],
        runs: Runs,
        shape: SampleShape,
        *,
        keep_tail: bool,
    ) -> None:
        """Lays the windows; touches no token.

        Args:
            label: Begins every error message of the reader.
            files: The token files.
            runs: What the split takes of them.
            shape: Of the samples.
            keep_tail: Whether tokens that fill no window make one with padding (validation, where
                every token counts) or are left out (training).
        """
        self.num_tokens = int(runs.cumulative[-1])
        # The first token of all is no label.
        num_labels = max(self.num_tokens - 1, 0)
        self.num_samples = num_labels // shape.seq_length
        if keep_tail:
            self.num_samples = -(-num_labels // shape.seq_length)
        self.rows = make_window_reader(label, files, runs, shape, self.num_samples)
