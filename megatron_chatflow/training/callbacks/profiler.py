"""Profiles a window of iterations on some ranks.

With ``--use-pytorch-profiler`` the trace is written to ``profile/`` in the run's folder and can be
opened in Perfetto or ``chrome://tracing``. Otherwise the window emits NVTX ranges between
cudaProfilerStart and cudaProfilerStop, for ``nsys profile --capture-range=cudaProfilerApi``.
"""

import logging
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_chatflow.config import RunConfig
from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime.ranks import Ranks
from megatron_chatflow.training.callbacks import Callback

logger = logging.getLogger(__name__)


class ProfilerWindow(Callback):
    """Profiles the iterations after ``profile_step_start`` up to ``profile_step_end``."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        """Checks the settings; nothing is profiled before the window begins."""
        settings = config.logging
        if settings.profile and not settings.use_pytorch_profiler and not ranks.is_cuda:
            raise UserError("logging.profile: NVTX ranges need CUDA; add --use-pytorch-profiler")
        if settings.profile and max(settings.profile_ranks) >= ranks.process.world_size:
            raise UserError(
                f"logging.profile_ranks: {max(settings.profile_ranks)} is not a rank of this "
                f"run, which has {ranks.process.world_size} processes; use ranks from 0 to "
                f"{ranks.process.world_size - 1}"
            )
        is_chosen = settings.profile and ranks.process.rank in settings.profile_ranks
        self._window = (settings.profile_step_start, settings.profile_step_end)
        self._is_pending = is_chosen
        self._is_cuda = ranks.is_cuda
        self._rank = ranks.process.rank
        self._folder: Path | None = None
        if settings.use_pytorch_profiler and config.checkpoint.save is not None:
            self._folder = Path(config.checkpoint.save) / "profile"
        self._running: ExitStack | None = None

    def before_iteration(self, iteration: int) -> None:
        """Starts or stops the profile."""
        if self._running is not None and iteration > self._window[1]:
            self.close()
        if self._is_pending and self._window[0] < iteration <= self._window[1]:
            self._is_pending = False
            self._running = ExitStack()
            try:
                self._start(self._running, iteration)
            except Exception as error:
                logger.warning("the profiler could not be started: %s", error)
                self.close()

    def close(self) -> None:
        """Stops a running profile and writes it; logs a warning if that fails."""
        if self._running is None:
            return
        running, self._running = self._running, None
        try:
            running.close()
        except Exception as error:
            logger.warning("the profile of rank %d could not be written: %s", self._rank, error)

    def _start(self, running: ExitStack, iteration: int) -> None:
        if self._folder is None:
            cuda: Any = torch.cuda  # its types differ between PyTorch releases
            cuda.check_error(cuda.cudart().cudaProfilerStart())
            running.callback(lambda: cuda.check_error(cuda.cudart().cudaProfilerStop()))
            emit_nvtx: Any = torch.autograd.profiler.emit_nvtx
            running.enter_context(emit_nvtx(record_shapes=True))
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._is_cuda else [])]
        name = f"rank_{self._rank}_iterations_{iteration}_to_{self._window[1]}.json.gz"
        path = self._folder / name
        recorder = profile(activities=activities, record_shapes=True)
        recorder.start()
        running.callback(lambda: _write(recorder, path))


def _write(recorder: profile, path: Path) -> None:
    """Stops the recording and writes the trace under its final name once it is complete."""
    recorder.stop()
    path.parent.mkdir(parents=True, exist_ok=True)
    # A fixed name, so that a restart overwrites what a killed process left. PyTorch compresses if
    # the name ends with .gz.
    partial = path.with_name(f".partial.{path.name}")
    try:
        recorder.export_chrome_trace(str(partial))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    logger.info("wrote profile %s", path)
