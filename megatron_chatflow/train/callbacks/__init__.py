"""What watches a run without changing it: one hook a file, all on the reporting rank.

A hook that raises does not end the run: `Shield` logs the failure, and the next report is tried
again.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from megatron_chatflow.evaluation.validation import SourceLoss
from megatron_chatflow.train.report import IterationReport


class Hook(Protocol):
    """A watcher of a run."""

    def on_iterations(self, reports: Sequence[IterationReport]) -> None:
        """Before each log, validation and save: each iteration since the last call, in order."""

    def on_log(self, report: IterationReport) -> None:
        """After each log interval: the means and sums over its iterations."""

    def on_validation(self, iteration: int, losses: Mapping[str, SourceLoss]) -> None:
        """After each validation, with each source's loss."""

    def on_choice(self, iteration: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        """After choice questions were put: by name, what `evaluate_choice.tally` returns."""

    def close(self) -> None:
        """At the end of the run, however it ends."""
