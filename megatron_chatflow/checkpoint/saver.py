"""Saves a run's checkpoints while it trains on.

In: the model's chunks, the optimizer and a `RunState`, at the iterations that are due. Out: folders
``iter_0000100/`` that appear whole or not at all, and ``latest_checkpointed_iteration.txt``, which
moves only then. Training waits while its tensors are copied into host memory that is kept for it;
threads write the copy. With ``--no-async-save`` training waits for the disk too, and no copy is
kept. One save is under way at a time; the next one waits for it.
"""

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_chatflow.checkpoint import megatron
from megatron_chatflow.checkpoint.background import (
    BackgroundSave,
    Progress,
    Publication,
    Write,
    log_failure,
)
from megatron_chatflow.checkpoint.carried_files import in_checkpoint
from megatron_chatflow.checkpoint.direct_file import CHUNK_BYTES, DirectFile, FileHash
from megatron_chatflow.checkpoint.files import iteration_folder
from megatron_chatflow.checkpoint.reports import ReportBox, name_of_job
from megatron_chatflow.checkpoint.shard_plan import FileImage, Plan, lay_out
from megatron_chatflow.checkpoint.staging import StagingBuffer, page_aligned
from megatron_chatflow.checkpoint.store import RunState, all_agree, parts_to_save
from megatron_chatflow.config import RunConfig
from megatron_chatflow.runtime.ranks import Ranks

logger = logging.getLogger(__name__)

_NUM_SLOTS = 3  # chunks in memory while a file is written without a copy of it


def _nothing() -> None:
    pass


class CheckpointSaver:
    """Saves checkpoints of one run; every rank has one and calls it at the same iterations."""

    def __init__(
        self,
        root: Path,
        config: RunConfig,
        ranks: Ranks,
        *,
        durable_iteration: int | None,
        carried: Mapping[str, bytes] | None = None,
        on_progress: Progress = _nothing,
    ) -> None:
        """Takes the run's folder.

        Args:
            root: The run's folder.
            config: Resolved configuration, stored beside the weights.
            ranks: This process's place.
            durable_iteration: The checkpoint that the run goes on from; None if it begins.
            carried: Small files that every checkpoint carries to an export, by name; rank 0 writes
                them.
            on_progress: Called while training waits for a save that gets on.
        """
        self._carried = dict(carried or {})
        self._root = root
        self._config = config
        self._ranks = ranks
        self._durable = durable_iteration
        self._newest: Path | None = None
        self._on_progress = on_progress
        self._pending: BackgroundSave | None = None
        self._buffer = StagingBuffer(ranks.device)
        # A rank without the memory for it writes at once; that is its own affair.
        self._has_copy = config.checkpoint.async_save
        self._job = name_of_job(ranks.device)
        self._num_saves = 0
        self._sent_plan: Plan | None = None
        self._plans: dict[int, Plan] = {}

    def prepare(self, chunks: list[Any], optimizer: Any) -> None:
        """Makes the memory ready that the first save copies into; after the first step.

        Without it the first save blocks longer, while its memory is touched for the first time.
        """
        if self._has_copy:
            image, _ = self._image(chunks, optimizer)
            self._has_copy = self._buffer.reserve(image.num_bytes)

    def save(self, state: RunState, chunks: list[Any], optimizer: Any) -> bool:
        """Begins a save; waits for the one before, if that is still under way.

        A save that fails (a full disk, a quota, a folder that cannot be written) is logged, leaves
        nothing behind, and leaves the previous checkpoint as it was.

        Args:
            state: The run's own state.
            chunks: Model chunks, with or without gradient buffers around them.
            optimizer: megatron-core's optimizer.

        Returns:
            Whether it began; with ``--no-async-save``, whether the checkpoint is on the disk.
        """
        begin = time.perf_counter()
        self.finish()
        final = iteration_folder(self._root, state.iteration)
        beside = self._root / f".{final.name}.saving"
        staged: list[tuple[FileImage, bytes, Write]] = []

        def stage() -> None:
            if self._ranks.is_reporter:
                self._make_empty(beside)
            image, common = self._image(chunks, optimizer)
            staged.append((image, common, self._copied(image, beside)))

        if not self._all_succeed(stage, final, beside):
            return False
        image, common, write = staged[0]
        if not self._has_copy:
            write = _written_now(write, self._on_progress)
        self._start(state, image, common, write, (final, beside), begin)
        if self._ranks.is_reporter:
            logger.info(
                "saving %s: training waited %.3f s for %.2f GB a rank",
                final,
                time.perf_counter() - begin,
                image.num_bytes / 1e9,
            )
        return self._config.checkpoint.async_save or self.finish() == state.iteration

    @property
    def is_busy(self) -> bool:
        """Whether this rank still writes a checkpoint."""
        return self._pending is not None and not self._pending.is_done

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint that this run has saved, the same on every rank; None if none."""
        return self._newest

    def finish(self) -> int | None:
        """Waits for the save under way; every rank calls it.

        Returns:
            The iteration of the newest checkpoint that is on the disk; None if there is none.
        """
        pending = self._pending
        if pending is None:
            return self._durable
        if self.is_busy and self._ranks.is_reporter and self._has_copy:
            logger.info("waiting for the checkpoint of iteration %d", pending.iteration)
        is_fine = pending.wait(self._on_progress)
        self._pending = None
        if all_agree(is_fine, self._ranks.device):
            self._durable = pending.iteration
            self._newest = iteration_folder(self._root, pending.iteration)
        pending.forget()
        return self._durable

    def close(self) -> None:
        """Waits for what this rank still writes, whatever ended the run, and lets memory go."""
        if self._pending is not None:
            self._pending.cancel()
            self._pending.wait(self._on_progress)
            self._pending = None
        self._buffer.release()

    def _image(self, chunks: list[Any], optimizer: Any) -> tuple[FileImage, bytes]:
        pieces, objects, common = parts_to_save(chunks, optimizer, self._ranks)
        return lay_out(f"__{self._ranks.process.rank}_0.distcp", pieces, objects), common

    def _copied(self, image: FileImage, beside: Path) -> Write:
        """Copies this rank's file into memory; returns what writes it."""
        name = image.plan["file"]
        self._has_copy = self._has_copy and self._buffer.reserve(image.num_bytes)
        if not self._has_copy:
            device = self._ranks.device
            return lambda progress: {name: _write_in_chunks(image, beside / name, device, progress)}
        image.copy(0, image.num_bytes, self._buffer.tensor())
        if self._ranks.is_cuda:
            torch.cuda.synchronize(self._ranks.device)
        data, num_bytes = self._buffer.bytes(), image.num_bytes
        return lambda progress: {name: _write_whole(data, num_bytes, beside / name, progress)}

    def _start(
        self,
        state: RunState,
        image: FileImage,
        common: bytes,
        write: Write,
        folders: tuple[Path, Path],
        begin: float,
    ) -> None:
        final, beside = folders
        self._num_saves += 1
        plan = image.plan if image.plan != self._sent_plan else None
        self._sent_plan = image.plan
        process = self._ranks.process
        box = ReportBox(f"{self._job}/{self._num_saves}")
        self._pending = BackgroundSave(state.iteration, write, box, process.rank, plan)
        if not self._ranks.is_reporter:
            return
        settings = self._config.checkpoint
        publication = Publication(
            root=self._root,
            beside=beside,
            final=final,
            iteration=state.iteration,
            small_files={
                "common.pt": common,
                "metadata.json": megatron.format_file(),
                "config.yaml": self._config.to_yaml().encode(),
                "state.json": json.dumps(asdict(state), indent=1).encode(),
                **in_checkpoint(self._carried),
            },
            retain=settings.save_retain,
            keep_every=settings.save_keep_every,
        )
        self._pending.publish(publication, process.world_size, self._plans, begin)

    def _make_empty(self, folder: Path) -> None:
        """Makes the folder; what an earlier job left of its saves goes, it takes up room."""
        with contextlib.suppress(OSError):
            for left in [*self._root.glob(".iter_*.saving"), *self._root.glob(".iter_*.removed")]:
                shutil.rmtree(left, ignore_errors=True)
        folder.mkdir(parents=True)

    def _all_succeed(self, step: Callable[[], None], final: Path, beside: Path) -> bool:
        """Runs a step of a save on every rank; if one fails, nothing is left of it."""
        error: BaseException | None = None
        try:
            step()
        except Exception as caught:
            error = caught
        if all_agree(error is None, self._ranks.device):
            return True
        if error is not None:
            log_failure(final, error)
        if self._ranks.is_reporter:
            shutil.rmtree(beside, ignore_errors=True)
        return False


def _written_now(write: Write, on_progress: Progress) -> Write:
    """Writes while training waits; returns what tells of it, or fails as the write did."""
    try:
        hashes = write(on_progress)
    except Exception as caught:
        error = caught

        def fail(_: Progress) -> dict[str, FileHash]:
            raise error

        return fail
    return lambda _: hashes


def _write_whole(data: memoryview, num_bytes: int, path: Path, progress: Progress) -> FileHash:
    with contextlib.closing(DirectFile(path, num_bytes)) as file:
        chunks = [
            file.submit(begin, data[begin : begin + CHUNK_BYTES])
            for begin in range(0, num_bytes, CHUNK_BYTES)
        ]
        for chunk in chunks:
            chunk.result()
            progress()
        return file.finish()


def _write_in_chunks(
    image: FileImage, path: Path, device: torch.device, progress: Progress
) -> FileHash:
    """Writes a file from its tensors through a few chunks of memory."""
    slots = [page_aligned(CHUNK_BYTES) for _ in range(_NUM_SLOTS)]
    with contextlib.closing(DirectFile(path, image.num_bytes)) as file:
        waiting: list[Any] = [None] * _NUM_SLOTS
        for number, begin in enumerate(range(0, image.num_bytes, CHUNK_BYTES)):
            slot = number % _NUM_SLOTS
            if waiting[slot] is not None:
                waiting[slot].result()
            memory, tensor = slots[slot]
            image.copy(begin, min(begin + CHUNK_BYTES, image.num_bytes), tensor)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            waiting[slot] = file.submit(begin, memoryview(memory)[:CHUNK_BYTES])
            progress()
        for chunk in waiting:
            if chunk is not None:
                chunk.result()
        return file.finish()
