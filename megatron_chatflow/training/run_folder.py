"""The folder of a run: its lock, its metrics and the callbacks that report to it.

A folder that cannot be written is a user error; a logger that fails is not.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

from megatron_chatflow.blend.edits import Edit
from megatron_chatflow.checkpoint.decisions import METRICS_FILE
from megatron_chatflow.checkpoint.files import write_unless_disk_full
from megatron_chatflow.config import RunConfig, RunLength
from megatron_chatflow.errors import LocalError, UserError
from megatron_chatflow.files import FileLock, is_disk_full
from megatron_chatflow.runtime.ranks import Ranks
from megatron_chatflow.training.callbacks import Callback
from megatron_chatflow.training.callbacks.console import Console
from megatron_chatflow.training.callbacks.isolated import IsolatedCallback
from megatron_chatflow.training.callbacks.metrics_file import (
    MetricsFile,
    Truncation,
    truncate_metrics,
)
from megatron_chatflow.training.callbacks.restarts import (
    StatusFile,
    delete_restarts,
    record_restart,
)
from megatron_chatflow.training.callbacks.scalars import TensorBoard, WeightsAndBiases
from megatron_chatflow.training.report import Downtime

logger = logging.getLogger(__name__)

# A killed job may take a moment to release its lock.
LOCK_TIMEOUT_SECONDS = 20.0


def lock_folder(folder: Path, *, timeout_seconds: float = LOCK_TIMEOUT_SECONDS) -> FileLock:
    """Creates and locks a run's folder, so that no second run writes the same files.

    The lock ends with the process, or with `FileLock.release`.

    Raises:
        UserError: The folder cannot be created or written, or another process trains into it.
    """
    path = folder / ".lock"
    deadline = time.monotonic() + timeout_seconds
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while (lock := FileLock.acquire(path, for_writing=True)) is None:
            if time.monotonic() >= deadline:
                owner = path.read_text(encoding="utf-8", errors="replace")[:64].strip()
                raise UserError(
                    f"checkpoint.save: {folder}: another run ({owner or 'unknown'}) is writing "
                    "to this folder; stop it, or use another --save"
                )
            time.sleep(0.1)
    except OSError as error:
        raise UserError(f"checkpoint.save: {folder}: {error.strerror}") from None
    if not lock.is_effective:
        logger.warning(
            "checkpoint.save: the file system does not support locks; a second run in the same "
            "folder will not be detected"
        )
    with contextlib.suppress(OSError):  # on a full disk the lock has no owner's name
        os.ftruncate(lock.descriptor, 0)
        name = f"process {os.getpid()} on {os.uname().nodename}"
        os.pwrite(lock.descriptor, name.encode(), 0)
    return lock


def open_run_folder(
    config: RunConfig, ranks: Ranks, length: RunLength, edit: Edit | None, stack: ExitStack
) -> tuple[list[Callback], Downtime]:
    """Opens the run's folder and creates the callbacks that report, on the reporting rank only.

    ``edit`` is what this resume changed in the schedule. ``stack`` closes callbacks and folder.

    Returns:
        The callbacks, none on other ranks, and the cost of restarts.

    Raises:
        UserError: The folder cannot be written, or another run writes there.
    """
    if not ranks.is_reporter:
        return [], Downtime()
    if config.logging.wandb_project is not None and find_spec("wandb") is None:
        raise LocalError(
            "logging.wandb_project: wandb is not installed; run pip install wandb, or "
            "remove this setting"
        )
    iteration = length.iteration
    makers: list[Callable[[], Callback]] = [
        lambda: Console(num_iterations=length.last_iteration, iteration=iteration)
    ]
    downtime = Downtime()
    status_files: list[Callback] = []
    if config.checkpoint.save is not None:
        folder = Path(config.checkpoint.save)
        stack.callback(lock_folder(folder).release, remove=False)
        try:
            truncation = truncate_metrics(folder / METRICS_FILE, iteration)
            downtime = _record_restart(config, folder, truncation, iteration, edit)
            status_files = [StatusFile(folder)]
            # Every checkpoint has its own copy.
            write_unless_disk_full(
                folder / "config.yaml", config.to_yaml(), otherwise="it is not written"
            )
            every_iteration = config.logging.metrics_every_iteration
            makers.append(_metrics_maker(folder, every_iteration=every_iteration))
        except OSError as error:
            raise UserError(f"checkpoint.save: {folder}: {error.strerror}") from None
        if config.logging.tensorboard:
            makers.append(lambda: TensorBoard(folder, iteration=iteration))
        if config.logging.wandb_project is not None:
            makers.append(lambda: WeightsAndBiases(config, folder))
    callbacks = [*map(IsolatedCallback, makers), *status_files]
    for callback in callbacks:
        stack.callback(callback.close)
    return callbacks, downtime


def _record_restart(
    config: RunConfig, folder: Path, truncation: Truncation, iteration: int, edit: Edit | None
) -> Downtime:
    """Records this start if it is a restart; returns the cost of all restarts."""
    checkpoint = config.checkpoint
    # A run that was killed before its first checkpoint starts anew, by the same command.
    starts_anew = (
        checkpoint.load == checkpoint.save and not checkpoint.finetune and truncation.first_dropped
    )
    if iteration or starts_anew:
        changes = []
        if edit is not None:
            changes = ["schedule edited", *(f"source {name} added" for name in edit.added)]
            changes += [f"source {name} removed" for name in edit.removed]
        return record_restart(folder, truncation, iteration, time.time(), changes)
    delete_restarts(folder)
    if truncation.last_dropped is not None:
        logger.warning(
            "%s: removed the iterations up to %s of an earlier run that left no checkpoint",
            folder / METRICS_FILE,
            truncation.last_dropped["iteration"],
        )
    return Downtime()


def _metrics_maker(folder: Path, *, every_iteration: bool) -> Callable[[], Callback]:
    """Opens the metrics file now, or with a later report if the disk is full."""
    try:
        metrics = MetricsFile(folder, every_iteration=every_iteration)
    except OSError as error:
        if not is_disk_full(error):
            raise
        return lambda: MetricsFile(folder, every_iteration=every_iteration)
    return lambda: metrics
