"""A profile of some iterations, on some ranks.

In: the ``logging`` section. Out: with torch's profiler a trace in ``profile/`` of the run's folder,
to be opened in Perfetto or ``chrome://tracing``; otherwise NVTX ranges between cudaProfilerStart
and -Stop, for ``nsys profile --capture-range=cudaProfilerApi``. Without a profile nothing is done.
"""

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_chatflow.config import RunConfig
from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime.ranks import Ranks

Mark = Callable[[str], AbstractContextManager[object]]
"""Names a part of a step, for those who look at a profile."""

logger = logging.getLogger(__name__)


def no_mark(name: str) -> AbstractContextManager[object]:
    """Names nothing."""
    return nullcontext()


class ProfilerWindow:
    """Profiles the iterations after ``profile_step_start`` up to ``profile_step_end``."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        """Takes the window; nothing runs yet.

        Raises:
            UserError: NVTX ranges are asked for without CUDA, or ranks that the job does not have.
        """
        settings = config.logging
        if settings.profile and not settings.use_pytorch_profiler and not ranks.is_cuda:
            raise UserError("logging.profile: NVTX ranges need CUDA; add --use-pytorch-profiler")
        if settings.profile and max(settings.profile_ranks) >= ranks.process.world_size:
            raise UserError(
                f"logging.profile_ranks: {max(settings.profile_ranks)} is not below the number of "
                f"processes {ranks.process.world_size}"
            )
        is_chosen = settings.profile and ranks.process.rank in settings.profile_ranks
        self._window = (settings.profile_step_start, settings.profile_step_end)
        self._is_ahead = is_chosen
        self._is_cuda = ranks.is_cuda
        self._rank = ranks.process.rank
        self._folder: Path | None = None
        if settings.use_pytorch_profiler and config.checkpoint.save is not None:
            self._folder = Path(config.checkpoint.save) / "profile"
        self._running: ExitStack | None = None

    def before(self, num_done: int) -> None:
        """Begins or ends the profile; called before the step that follows ``num_done``."""
        if self._running is not None and num_done >= self._window[1]:
            self.close()
        if self._is_ahead and self._window[0] <= num_done < self._window[1]:
            self._is_ahead = False
            self._running = ExitStack()
            try:
                self._start(self._running, num_done)
            except Exception as error:
                logger.warning("the profiler cannot be started: %s", error)
                self.close()

    def mark(self, name: str) -> AbstractContextManager[object]:
        """A range with a name, while there is a profile."""
        return record_function(name) if self._running is not None else nullcontext()

    def close(self) -> None:
        """Ends a profile that is under way and writes it; where that fails, it warns."""
        if self._running is None:
            return
        running, self._running = self._running, None
        try:
            running.close()
        except Exception as error:
            logger.warning("the profile of rank %d is lost: %s", self._rank, error)

    def _start(self, running: ExitStack, num_done: int) -> None:
        if self._folder is None:
            cuda: Any = torch.cuda  # types that torch's releases do not agree on
            cuda.check_error(cuda.cudart().cudaProfilerStart())
            running.callback(lambda: cuda.check_error(cuda.cudart().cudaProfilerStop()))
            emit_nvtx: Any = torch.autograd.profiler.emit_nvtx
            running.enter_context(emit_nvtx(record_shapes=True))
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._is_cuda else [])]
        name = f"rank_{self._rank}_iterations_{num_done + 1}_to_{self._window[1]}.json.gz"
        path = self._folder / name
        recorder = profile(activities=activities, record_shapes=True)
        recorder.start()
        running.callback(lambda: _write(recorder, path))


def _write(recorder: profile, path: Path) -> None:
    """Ends the recording; the trace appears whole."""
    recorder.stop()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Its fixed name is reused after a kill; torch compresses where a name ends with .gz.
    beside = path.with_name(f".partial.{path.name}")
    try:
        recorder.export_chrome_trace(str(beside))
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    logger.info("wrote the profile %s", path)
