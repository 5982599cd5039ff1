"""Optional behaviour of a run, one callback per file.

`Callback` names the hooks. `training.build` creates the callbacks, and the training loop calls each
hook on all of them in this order:

1. `process.Heartbeat` tells the watchdog which phase starts.
2. `cuda_graphs.CudaGraphs` captures parts of the layers after the first steps.
3. `profiler.ProfilerWindow` starts and stops a profile.
4. `straggler.StragglerDetector` times forward and backward passes.
5. `choice.ChoiceEval` evaluates multiple-choice questions.
6. `probes.ProbeEval` evaluates probes of transfer.
7. `process.GarbageCollection` collects garbage at the same iterations on every rank.
8. `process.FreedMemory` returns freed memory to the system (CPU only).
9. On the reporting rank `console.Console`, `metrics_file.MetricsFile`, `scalars.TensorBoard` and
   `scalars.WeightsAndBiases`, each inside an `isolated.IsolatedCallback`, so that an error in one
   of them does not end the run; then `restarts.StatusFile`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from megatron_chatflow.evaluation.validation import SourceLoss
    from megatron_chatflow.training.loop import Run, TrainState
    from megatron_chatflow.training.report import IterationReport

ExitStatus = Literal["finished", "exit_interval", "stop_requested", "failed"]


class Callback:
    """Base class of all callbacks. Every hook does nothing.

    The loop calls the hooks up to `on_exit` on every rank, so they may use collectives. Reports
    exist on the reporting rank only; `on_validation`, `on_decision`, `on_choice` and `on_probes`
    receive the same values on every rank, except for times.
    """

    def before_iteration(self, iteration: int) -> None:
        """Called before the batch of ``iteration`` (counted from 1) is loaded."""

    def before_step(self, iteration: int) -> None:
        """Called between loading and the forward pass."""

    def after_step(self, iteration: int) -> None:
        """Called after the update."""

    def before_validation(self, iteration: int, name: str) -> None:
        """Called before each evaluation of the model, such as ``validation``."""

    def on_evaluate(self, run: Run, state: TrainState) -> None:
        """Called after each iteration has been logged and validated, and before it is saved.

        It is also called once before the first iteration of a new run.
        """

    def on_save(self, iteration: int) -> None:
        """Called before a checkpoint is saved, and before the run waits for the last one."""

    def after_iteration(self, iteration: int) -> None:
        """Called at the end of each iteration."""

    def on_exit(self, status: ExitStatus) -> None:
        """Called once the run has ended and everything is saved, or when it has failed."""

    def on_iterations(self, reports: Sequence[IterationReport]) -> None:
        """Receives each iteration since the last call, in order.

        It is called before every log, validation and save.
        """

    def on_log(self, report: IterationReport) -> None:
        """Receives the means and sums over a log interval."""

    def on_validation(self, iteration: int, losses: Mapping[str, SourceLoss]) -> None:
        """Receives each source's validation loss."""

    def on_decision(self, iteration: int, decision: Mapping[str, Any]) -> None:
        """Receives the weights of a horizon when a controller has decided them."""

    def on_choice(self, iteration: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Receives the result of `evaluation.choice.summarize_choice` for each question file."""

    def on_probes(
        self, iteration: int, results: Mapping[str, Mapping[str, float]], seconds: float
    ) -> None:
        """Receives each probe's numbers (`evaluation.probes.ProbeResult`) and the time they took.

        The time is this rank's wall time in seconds.
        """

    def on_upload(self, iteration: int, result: Mapping[str, Any]) -> None:
        """Receives the outcome of a checkpoint's upload, some iterations after it was saved."""

    def close(self) -> None:
        """Called when the run is torn down, however it ended."""
