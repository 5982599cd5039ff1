"""Opens what a run keeps of itself: its folder, the metrics, and everybody who watches.

In: the configuration and where the run stands. Out: the hooks of the reporting rank, and what
restarts have cost. A folder that cannot be written is a user's mistake; a logger that fails is not.
"""

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

from megatron_chatflow.blend.edits import Edit
from megatron_chatflow.checkpoint.files import write_unless_disk_full
from megatron_chatflow.config import RunConfig, RunLength
from megatron_chatflow.errors import LocalError, UserError
from megatron_chatflow.files import is_disk_full
from megatron_chatflow.runtime.ranks import Ranks
from megatron_chatflow.train.callbacks import Hook
from megatron_chatflow.train.callbacks.console import Console
from megatron_chatflow.train.callbacks.metrics_file import (
    METRICS_FILE,
    MetricsFile,
    Truncation,
    truncate_metrics,
)
from megatron_chatflow.train.callbacks.shield import Shield
from megatron_chatflow.train.callbacks.weights_and_biases import WeightsAndBiases
from megatron_chatflow.train.report import Downtime
from megatron_chatflow.train.restarts import delete_restarts, record_restart, write_status
from megatron_chatflow.train.run_folder import RunFolder

logger = logging.getLogger(__name__)


def open_record(
    config: RunConfig, ranks: Ranks, length: RunLength, edit: Edit | None, stack: ExitStack
) -> tuple[list[Hook], Downtime]:
    """Opens the run's folder and its watchers, on the reporting rank; others have none.

    Args:
        config: The run's.
        ranks: This process's place.
        length: Where it stands and ends.
        edit: What this resume changed in the schedule; None if nothing.
        stack: Closes everything.

    Raises:
        UserError: The folder cannot be written, or another run writes there.
    """
    if not ranks.is_reporter:
        return [], Downtime()
    if config.logging.wandb_project is not None and find_spec("wandb") is None:
        raise LocalError(
            "logging.wandb_project: wandb is not installed; pip install wandb, or leave it out"
        )
    iteration = length.iteration
    makers: list[Callable[[], Hook]] = [
        lambda: Console(num_iterations=length.last_iteration, iteration=iteration)
    ]
    downtime = Downtime()
    if config.checkpoint.save is not None:
        folder = Path(config.checkpoint.save)
        stack.callback(RunFolder(folder).close)
        try:
            cut = truncate_metrics(folder / METRICS_FILE, iteration)
            downtime = _downtime(config, folder, cut, iteration, edit)
            write_status(folder, "running")
            # Every checkpoint has its own anyway.
            write_unless_disk_full(
                folder / "config.yaml", config.to_yaml(), otherwise="it is not written"
            )
            every_iteration = config.logging.metrics_every_iteration
            makers.append(_metrics_maker(folder, every_iteration=every_iteration))
        except OSError as error:
            raise UserError(f"checkpoint.save: {folder}: {error.strerror}") from None
        if config.logging.tensorboard:
            makers.append(lambda: _tensorboard(folder, iteration))
        if config.logging.wandb_project is not None:
            makers.append(lambda: WeightsAndBiases(config, folder))
    hooks: list[Hook] = [Shield(maker) for maker in makers]
    for hook in hooks:
        stack.callback(hook.close)
    return hooks, downtime


def _downtime(
    config: RunConfig, folder: Path, cut: Truncation, iteration: int, edit: Edit | None
) -> Downtime:
    """What restarts have cost, this one included if it is one."""
    checkpoint = config.checkpoint
    # A run that was killed before its first checkpoint begins anew, by the same command.
    begins_anew = (
        checkpoint.load == checkpoint.save and not checkpoint.finetune and cut.first_dropped
    )
    if iteration or begins_anew:
        return record_restart(folder, cut, iteration, time.time(), _changes(edit))
    delete_restarts(folder)
    if cut.last_dropped is not None:
        logger.warning(
            "%s: the iterations of a run that left no checkpoint are dropped, up to %s",
            folder / METRICS_FILE,
            cut.last_dropped["iteration"],
        )
    return Downtime()


def _changes(edit: Edit | None) -> list[str]:
    """What an edit changed, an entry for each source that it added or removed."""
    if edit is None:
        return []
    return [
        "schedule edited",
        *(f"source {name} added" for name in edit.added),
        *(f"source {name} removed" for name in edit.removed),
    ]


def _metrics_maker(folder: Path, *, every_iteration: bool) -> Callable[[], Hook]:
    """Opens the file now, or where there is no room for it with a later report."""
    try:
        metrics = MetricsFile(folder, every_iteration=every_iteration)
    except OSError as error:
        if not is_disk_full(error):
            raise
        return lambda: MetricsFile(folder, every_iteration=every_iteration)
    return lambda: metrics


def _tensorboard(folder: Path, iteration: int) -> Hook:
    from megatron_chatflow.train.callbacks.tensorboard import TensorBoard

    return TensorBoard(folder, iteration=iteration)
