"""Writes a checkpoint in the background and publishes it.

Once this rank's tensors have been copied into a `StagingBuffer`, `BackgroundSave` runs in threads:
every rank writes its file and reports to rank 0 through `SaveReports`; rank 0 waits for all
reports and then executes a `Publication`, which writes the index and the run's state, renames the
folder and updates ``latest_checkpointed_iteration.txt``. A checkpoint therefore appears complete or
not at all.
"""

import contextlib
import ctypes
import json
import logging
import mmap
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.distributed.distributed_c10d import _get_default_store

from megatron_chatflow.checkpoint.direct_file import FileHash, hash_file, lower_thread_priority
from megatron_chatflow.checkpoint.files import LATEST, MANIFEST, manifest_text, prune
from megatron_chatflow.checkpoint.layout import Plan, index_files
from megatron_chatflow.checkpoint.remote import CheckpointUploader
from megatron_chatflow.files import replace_folder, sync_folder, write_and_sync, write_atomically

logger = logging.getLogger(__name__)

_TOUCH_BYTES = 64 * 2**20
_HUGE_PAGE = 2 * 2**20
# Share of the machine's memory that is left to everything else.
_MEMORY_MARGIN = 0.1
_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.1  # seconds between two checks of the store
_PAUSE_SECONDS = 0.2

OnProgress = Callable[[], None]
Write = Callable[[OnProgress], dict[str, FileHash]]
"""Writes this rank's files, calls back after each chunk, and returns the files' hashes."""


def page_aligned(num_bytes: int) -> tuple[mmap.mmap, torch.Tensor]:
    """Returns page-aligned memory of ``num_bytes`` or more, and the same as a uint8 tensor."""
    size = max(1, -(-num_bytes // _HUGE_PAGE)) * _HUGE_PAGE
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory, torch.frombuffer(memory, dtype=torch.uint8)


class StagingBuffer:
    """Host memory for a copy of this rank's part of a checkpoint, kept from save to save.

    The first touch of memory is several times slower than the copy itself, because of a page fault
    for each 4 KiB. The buffer is therefore touched ahead of time by a thread, and pinned if the
    tensors are on a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: mmap.mmap | None = None
        self._tensor: torch.Tensor | None = None
        self._toucher: threading.Thread | None = None
        self._is_pinned = False

    def reserve(self, num_bytes: int) -> bool:
        """Allocates memory and touches it in the background; returns whether there is enough."""
        if self._tensor is not None and len(self._tensor) >= num_bytes:
            return True
        self.release()
        memory = psutil.virtual_memory()
        if num_bytes > memory.available - _MEMORY_MARGIN * memory.total:
            logger.warning(
                "a copy of this rank's checkpoint (%.1f GB) does not fit in the available "
                "memory (%.1f GB); training is blocked while checkpoints are written",
                num_bytes / 1e9,
                memory.available / 1e9,
            )
            return False
        self._memory, self._tensor = page_aligned(num_bytes)
        self._toucher = threading.Thread(
            target=_touch, args=(self._tensor,), name="checkpoint-staging", daemon=True
        )
        self._toucher.start()
        return True

    def tensor(self) -> torch.Tensor:
        """Waits until the buffer is touched and pinned, and returns it as a uint8 tensor."""
        assert self._tensor is not None
        if self._toucher is not None:
            self._toucher.join()
            self._toucher = None
            if self._device.type == "cuda":
                self._pin(self._tensor)
        return self._tensor

    def bytes(self) -> memoryview:
        """Returns the same memory for writing it to a file."""
        assert self._memory is not None
        return memoryview(self._memory)

    def release(self) -> None:
        """Frees the memory."""
        if self._toucher is not None:
            self._toucher.join()
            self._toucher = None
        if self._is_pinned and self._tensor is not None:
            _cuda().cudaHostUnregister(self._tensor.data_ptr())
            self._is_pinned = False
        self._tensor = self._memory = None

    def _pin(self, tensor: torch.Tensor) -> None:
        # The allocator of `pin_memory` would round the size up to a power of two.
        code = _cuda().cudaHostRegister(tensor.data_ptr(), len(tensor), 0)
        self._is_pinned = int(code) == 0
        if not self._is_pinned:
            logger.warning(
                "the staging buffer for checkpoints could not be pinned (CUDA error %d); copies "
                "to it are slower",
                code,
            )


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _touch(tensor: torch.Tensor) -> None:
    lower_thread_priority()
    for begin in range(0, len(tensor), _TOUCH_BYTES):
        part = tensor[begin : begin + _TOUCH_BYTES]
        # ctypes releases the interpreter lock meanwhile.
        ctypes.memset(part.data_ptr(), 0, len(part))


@dataclass(frozen=True)
class Report:
    """A rank's report on its part of a save."""

    error: str | None = None  # what failed; None if the rank's files are on the disk
    # hashes of the files that the rank wrote
    files: dict[str, FileHash] = field(default_factory=dict)
    # the content of its file; None if it is the same as in the previous save
    plan: Plan | None = None

    def to_json(self) -> str:
        """Returns the report as it is sent through the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The inverse of `to_json`."""
        content: dict[str, Any] = json.loads(text)
        files = {name: FileHash(**entry) for name, entry in content["files"].items()}
        return cls(content["error"], files, content["plan"])


class SaveReports:
    """The reports of all ranks on one save, whose ``name`` is unique in the job.

    They go through the job's key-value store instead of a collective, because threads may use the
    store while training runs collectives of its own.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._store = _get_default_store()

    def put(self, rank: int, report: Report) -> None:
        """Sends a rank's report, from any thread."""
        self._store.set(self._key(rank), report.to_json())

    def wait_for_all(
        self, world_size: int, on_wait: Callable[[], None], is_cancelled: Callable[[], bool]
    ) -> list[Report]:
        """Waits for every rank's report and returns them in the order of ranks.

        A rank that fails reports too, and a rank that dies ends the job. Raises `RuntimeError` if
        it was cancelled.
        """
        keys = [self._key(rank) for rank in range(world_size)]
        if not self._wait_for(keys, on_wait, is_cancelled):
            raise RuntimeError("the job ended before all ranks had written their files")
        reports = [Report.from_json(self._store.get(key).decode()) for key in keys]
        for key in keys:
            self._store.delete_key(key)
        return reports

    def end(self) -> None:
        """Announces that rank 0 has finished this save, successfully or not, from any thread."""
        with contextlib.suppress(RuntimeError):  # the job may have ended, and its store with it
            self._store.set(self._key("end"), "")

    def wait_for_end(self, on_wait: Callable[[], None], is_cancelled: Callable[[], bool]) -> None:
        """Waits until rank 0 has finished, without the timeout of a collective."""
        self._wait_for([self._key("end")], on_wait, is_cancelled)

    def _wait_for(
        self, keys: list[str], on_wait: Callable[[], None], is_cancelled: Callable[[], bool]
    ) -> bool:
        pause = _FIRST_PAUSE
        while not self._store.check(keys):
            on_wait()
            if is_cancelled():
                return False
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return True

    def clear(self) -> None:
        """Removes the announcement of `end`, once every rank has seen it."""
        self._store.delete_key(self._key("end"))

    def _key(self, of: int | str) -> str:
        return f"megatron_chatflow/save/{self._name}/{of}"


def draw_job_id(device: torch.device) -> str:
    """Returns a random id drawn by rank 0, the same on every rank.

    It is part of the names of this job's saves, because the store may outlive a job that the
    launcher restarts.
    """
    drawn = torch.randint(2**62, (1,), dtype=torch.int64, generator=_unseeded())
    number = drawn.to(device)
    torch.distributed.broadcast(number, src=0)
    return f"{int(number.item()):016x}"


def _unseeded() -> torch.Generator:
    # A seeded generator would draw the same id after a restart.
    generator = torch.Generator()
    generator.seed()
    return generator


@dataclass(frozen=True)
class Publication:
    """Turns the written files into a checkpoint; executed by rank 0."""

    root: Path  # the run's folder
    temporary: Path  # the folder that the ranks write into
    final: Path
    iteration: int  # the checkpoint's iteration
    # contents of the files that rank 0 writes, by name relative to the folder
    small_files: Mapping[str, bytes]
    retain: int | None  # how many checkpoints to keep; all if None
    keep_every: int | None  # also keep checkpoints whose iteration is a multiple of this
    uploader: CheckpointUploader | None = None  # copies the checkpoint to a store

    def run(self, reports: list[Report], plans: list[Plan]) -> None:
        """Writes the small files and publishes.

        Raises:
            OSError: The disk is full or not writable.
            ValueError: The ranks' shards do not cover every tensor exactly.
        """
        hashes: dict[str, FileHash] = {}
        for report in reports:
            hashes.update(report.files)
        contents = {**self.small_files, **index_files(plans)}
        folders = set()
        for name, content in contents.items():
            path = self.temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_and_sync(path, content)
            hashes[name] = hash_file(path)
            folders |= set(path.parents[: name.count("/")])
        for folder in folders:
            sync_folder(folder)
        write_and_sync(self.temporary / MANIFEST, manifest_text(hashes).encode())
        sync_folder(self.temporary)
        # A folder of this name is there where a run resumed from an earlier iteration.
        replace_folder(self.final, self.temporary, self.root / f".{self.final.name}.removed")
        write_atomically(self.root / LATEST, f"{self.iteration}\n")

    def prune(self) -> None:
        """Removes old checkpoints; a failure is only logged."""
        if self.retain is None:
            return
        try:
            pinned = () if self.uploader is None else self.uploader.pinned()
            prune(self.root, retain=self.retain, keep_every=self.keep_every, pinned=pinned)
        except Exception as error:
            logger.warning("could not remove old checkpoints in %s: %s", self.root, error)


class BackgroundSave:
    """A save in progress. Its constructor starts the thread that writes this rank's files.

    ``plan`` is the content of the files; None if it is the same as in the previous save.
    """

    def __init__(
        self, iteration: int, write: Write, reports: SaveReports, rank: int, plan: Plan | None
    ) -> None:
        self.iteration = iteration
        self._is_written = False
        self._is_published: bool | None = None
        self._is_cancelled = threading.Event()
        self._num_chunks = 0
        self._reports = reports
        self._threads: list[threading.Thread] = []
        self._start(lambda: self._write(write, rank, plan))

    def publish(
        self, publication: Publication, world_size: int, plans: dict[int, Plan], begin: float
    ) -> None:
        """Starts a thread that waits for every rank and publishes; called by rank 0.

        ``plans`` holds the last known plan of each rank and is updated with those that are
        reported.
        """
        self._is_published = False
        self._start(lambda: self._publish(publication, world_size, plans, begin))

    @property
    def is_done(self) -> bool:
        """Whether this rank has finished."""
        return not any(thread.is_alive() for thread in self._threads)

    def wait(self, on_progress: OnProgress) -> bool:
        """Waits until the save has finished.

        ``on_progress`` is called after each chunk that this rank writes, and repeatedly while it
        waits for other ranks: each rank is responsible for its own progress.

        Returns:
            Whether it succeeded: on rank 0 for all ranks, elsewhere for this rank.
        """
        seen = -1
        for thread in self._threads:
            while thread.is_alive():
                thread.join(_PAUSE_SECONDS)
                if self._num_chunks != seen:
                    on_progress()
                seen = self._num_chunks
        if self._is_published is None:
            self._reports.wait_for_end(on_progress, self._is_cancelled.is_set)
            return self._is_written
        return self._is_published

    def clear(self) -> None:
        """Removes rank 0's announcement from the store, once every rank has seen it."""
        if self._is_published is not None:
            self._reports.clear()

    def cancel(self) -> None:
        """Stops waiting for other ranks. Chunks in progress are still written."""
        self._is_cancelled.set()

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name="checkpoint-save", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _count(self) -> None:
        self._num_chunks += 1

    def _write(self, write: Write, rank: int, plan: Plan | None) -> None:
        lower_thread_priority()
        try:
            report = Report(files=write(self._count), plan=plan)
        except BaseException as error:
            report = Report(error=f"rank {rank}: {reason(error)}", plan=plan)
        self._is_written = report.error is None
        self._reports.put(rank, report)

    def _publish(
        self, publication: Publication, world_size: int, plans: dict[int, Plan], begin: float
    ) -> None:
        lower_thread_priority()
        try:
            reports = self._reports.wait_for_all(world_size, self._count, self._is_cancelled.is_set)
            plans |= {rank: one.plan for rank, one in enumerate(reports) if one.plan is not None}
            errors = [report.error for report in reports if report.error is not None]
            if errors:
                raise RuntimeError("; ".join(errors[:3]))
            publication.run(reports, [plans[rank] for rank in range(world_size)])
        except BaseException as error:
            log_failure(publication.final, error)
            shutil.rmtree(publication.temporary, ignore_errors=True)
            return
        finally:
            self._reports.end()
        self._is_published = True
        logger.info("saved %s in %.2f s", publication.final, time.perf_counter() - begin)
        if publication.uploader is not None:
            publication.uploader.submit(publication.iteration)
        publication.prune()


def reason(error: BaseException) -> str:
    """Returns the cause of an error in one line: the system's message if there is one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__cause__ or cause.__context__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def log_failure(final: Path, error: BaseException) -> None:
    """Logs that a save failed and what follows from it."""
    folder = final.parent
    logger.error(
        "saving %s failed: %s (%.1f GB free there); the previous checkpoint is intact, training "
        "continues, and the next save is attempted as scheduled",
        final,
        reason(error),
        shutil.disk_usage(folder).free / 1e9 if folder.exists() else 0.0,
    )
