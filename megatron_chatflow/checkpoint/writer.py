"""A save after its bytes are copied: this rank's file, and on rank 0 the checkpoint's publication.

In: a staged file and what rank 0 adds to it. Out: a folder under its final name, or nothing. One
thread of every rank writes its file and reports; a thread of rank 0 waits for the reports and then
writes the index and the run's state, renames the folder, and moves ``latest``.

Host memory that holds a rank's part of a checkpoint while it is written.

In: a number of bytes. Out: a buffer of them, kept from save to save. Memory that a process touches
for the first time is slow (a page fault each 4 KiB), several times slower than the copy itself, so
the buffer is touched ahead, in the background, and is pinned where copies come from a GPU.

How ranks tell rank 0 that their part of a checkpoint is on the disk, without a collective.

In: a report of each rank. Out: all of them, on rank 0. They go through the job's key-value store,
which threads may use while training's own collectives run.
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

from megatron_chatflow.checkpoint.direct_file import (
    FileHash,
    hash_file,
    lower_thread_priority,
)
from megatron_chatflow.checkpoint.files import LATEST, MANIFEST, manifest_text, prune
from megatron_chatflow.checkpoint.layout import Plan, index_files
from megatron_chatflow.files import (
    ALIGNMENT,
    replace_folder,
    sync_folder,
    write_and_sync,
    write_atomically,
)

logger = logging.getLogger(__name__)

_TOUCH_BYTES = 64 * 2**20
_HUGE_PAGE = 2 * 2**20
# What is left to everything else on the machine.
_MEMORY_MARGIN = 0.1


def page_aligned(num_bytes: int) -> tuple[mmap.mmap, torch.Tensor]:
    """Memory for direct writes, and the same as a uint8 tensor, a block longer than asked for."""
    size = -(-(num_bytes + ALIGNMENT) // _HUGE_PAGE) * _HUGE_PAGE
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory, torch.frombuffer(memory, dtype=torch.uint8)


class StagingBuffer:
    """A buffer that grows to the largest checkpoint seen."""

    def __init__(self, device: torch.device) -> None:
        """Makes an empty one.

        Args:
            device: Where the copies will come from.
        """
        self._device = device
        self._memory: mmap.mmap | None = None
        self._tensor: torch.Tensor | None = None
        self._toucher: threading.Thread | None = None
        self._is_pinned = False

    def reserve(self, num_bytes: int) -> bool:
        """Makes room, and begins to touch it in the background.

        Returns:
            Whether this machine's memory has that much to spare; if not, nothing is taken.
        """
        if self._tensor is not None and len(self._tensor) >= num_bytes + ALIGNMENT:
            return True
        self.release()
        memory = psutil.virtual_memory()
        if num_bytes > memory.available - _MEMORY_MARGIN * memory.total:
            logger.warning(
                "a copy of this rank's checkpoint (%.1f GB) does not fit into the memory that is "
                "free (%.1f GB): training waits while checkpoints are written",
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
        """The buffer, uint8, once it is touched and pinned."""
        assert self._tensor is not None
        if self._toucher is not None:
            self._toucher.join()
            self._toucher = None
            if self._device.type == "cuda":
                self._pin(self._tensor)
        return self._tensor

    def bytes(self) -> memoryview:
        """The same memory, for writing it out."""
        assert self._memory is not None
        return memoryview(self._memory)

    def release(self) -> None:
        """Gives the memory back."""
        if self._toucher is not None:
            self._toucher.join()
            self._toucher = None
        if self._is_pinned and self._tensor is not None:
            _cuda().cudaHostUnregister(self._tensor.data_ptr())
            self._is_pinned = False
        self._tensor = self._memory = None

    def _pin(self, tensor: torch.Tensor) -> None:
        # Not `pin_memory`: its allocator rounds up to a power of two.
        code = _cuda().cudaHostRegister(tensor.data_ptr(), len(tensor), 0)
        self._is_pinned = int(code) == 0
        if not self._is_pinned:
            logger.warning("the checkpoint's staging buffer could not be pinned (CUDA %d)", code)


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _touch(tensor: torch.Tensor) -> None:
    lower_thread_priority()
    for begin in range(0, len(tensor), _TOUCH_BYTES):
        part = tensor[begin : begin + _TOUCH_BYTES]
        # ctypes lets other threads run meanwhile.
        ctypes.memset(part.data_ptr(), 0, len(part))


_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.1  # seconds between two looks into the store


@dataclass(frozen=True)
class Report:
    """What a rank says of its part.

    Attributes:
        error: What went wrong; None if the part is on the disk.
        files: Hashes of the files that it wrote.
        plan: What is in its file; None if that is the same as at the save before.
    """

    error: str | None = None
    files: dict[str, FileHash] = field(default_factory=dict)
    plan: Plan | None = None

    def to_json(self) -> str:
        """As it goes through the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The inverse of `to_json`."""
        content: dict[str, Any] = json.loads(text)
        files = {name: FileHash(**entry) for name, entry in content["files"].items()}
        return cls(content["error"], files, content["plan"])


class SaveReports:
    """Where the ranks of one save put their reports."""

    def __init__(self, name: str) -> None:
        """Opens a box.

        Args:
            name: Of the save; the same on every rank, and no other save's in this job.
        """
        self._name = name
        self._store = _get_default_store()

    def put(self, rank: int, report: Report) -> None:
        """Leaves a rank's report; it may come from any thread."""
        self._store.set(self._key(rank), report.to_json())

    def wait_for_all(
        self,
        world_size: int,
        on_wait: Callable[[], None],
        is_cancelled: Callable[[], bool],
    ) -> list[Report]:
        """Every rank's report, in order, once they are all there.

        A rank reports also when it fails, and a rank that dies takes the job with it.

        Args:
            world_size: The number of ranks.
            on_wait: Called before each look.
            is_cancelled: Whether to give up.

        Raises:
            RuntimeError: It was cancelled.
        """
        keys = [self._key(rank) for rank in range(world_size)]
        pause = _FIRST_PAUSE
        while not self._store.check(keys):
            on_wait()
            if is_cancelled():
                raise RuntimeError("the job ended before every rank had written its part")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        reports = [Report.from_json(self._store.get(key).decode()) for key in keys]
        for key in keys:
            self._store.delete_key(key)
        return reports

    def end(self) -> None:
        """Says that rank 0 is done with this save, well or not; it may come from any thread."""
        with contextlib.suppress(RuntimeError):  # the job may have ended, and its store with it
            self._store.set(self._key("end"), "")

    def wait_for_end(self, on_wait: Callable[[], None], is_cancelled: Callable[[], bool]) -> None:
        """Waits until rank 0 is done, without a collective's limit on time.

        Args:
            on_wait: Called before each look.
            is_cancelled: Whether to give up.
        """
        pause = _FIRST_PAUSE
        while not is_cancelled() and not self._store.check([self._key("end")]):
            on_wait()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def forget(self) -> None:
        """Removes what rank 0 said, once every rank has heard it."""
        self._store.delete_key(self._key("end"))

    def _key(self, of: int | str) -> str:
        return f"megatron_chatflow/save/{self._name}/{of}"


def draw_job_id(device: torch.device) -> str:
    """A number that rank 0 draws, the same on every rank: names this job's boxes.

    The store may outlive a job that its launcher restarts.
    """
    drawn = torch.randint(2**62, (1,), dtype=torch.int64, generator=_unseeded())
    number = drawn.to(device)
    torch.distributed.broadcast(number, src=0)
    return f"{int(number.item()):016x}"


def _unseeded() -> torch.Generator:
    # Not the seeded generator: the same seed would draw the same name after a restart.
    generator = torch.Generator()
    generator.seed()
    return generator


OnProgress = Callable[[], None]
Write = Callable[[OnProgress], dict[str, FileHash]]
"""Writes this rank's files, calls back after each part, and returns the files' hashes."""

_PAUSE_SECONDS = 0.2


@dataclass(frozen=True)
class Publication:
    """What rank 0 needs to make files a checkpoint.

    Attributes:
        root: The run's folder.
        beside: The folder that is written.
        final: The name that it gets.
        iteration: Of the checkpoint.
        small_files: Contents of the files that rank 0 writes, by name relative to the folder.
        retain: How many checkpoints stay; all if None.
        keep_every: Iterations whose multiples stay besides.
    """

    root: Path
    beside: Path
    final: Path
    iteration: int
    small_files: Mapping[str, bytes]
    retain: int | None
    keep_every: int | None

    def run(self, reports: list[Report], plans: list[Plan]) -> None:
        """Writes the small files and publishes.

        Raises:
            OSError: The disk is full or not writable.
            ValueError: The ranks' parts do not make a whole.
        """
        hashes: dict[str, FileHash] = {}
        for report in reports:
            hashes.update(report.files)
        contents = {**self.small_files, **index_files(plans)}
        folders = set()
        for name, content in contents.items():
            path = self.beside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_and_sync(path, content)
            hashes[name] = hash_file(path)
            folders |= set(path.parents[: name.count("/")])
        for folder in folders:
            sync_folder(folder)
        write_and_sync(self.beside / MANIFEST, manifest_text(hashes).encode())
        sync_folder(self.beside)
        # A folder of this name is there where a run resumed from an earlier iteration.
        replace_folder(self.final, self.beside, self.root / f".{self.final.name}.removed")
        write_atomically(self.root / LATEST, f"{self.iteration}\n")

    def prune(self) -> None:
        """Removes the checkpoints that are not to stay; a failure is logged."""
        if self.retain is None:
            return
        try:
            prune(self.root, retain=self.retain, keep_every=self.keep_every)
        except Exception as error:
            logger.warning("old checkpoints in %s were not removed: %s", self.root, error)


class BackgroundSave:
    """A save under way."""

    def __init__(
        self,
        iteration: int,
        write: Write,
        box: SaveReports,
        rank: int,
        plan: Plan | None,
    ) -> None:
        """Begins to write.

        Args:
            iteration: Of the checkpoint.
            write: Writes this rank's files.
            box: Where reports go.
            rank: Of this process.
            plan: What is in the files; None if the same as before.
        """
        self.iteration = iteration
        self._is_written = False
        self._is_published: bool | None = None
        self._is_cancelled = threading.Event()
        self._num_parts = 0
        self._box = box
        self._threads: list[threading.Thread] = []
        self._start(lambda: self._write(write, rank, plan))

    def publish(
        self, publication: Publication, world_size: int, plans: dict[int, Plan], begin: float
    ) -> None:
        """Waits for every rank and publishes, in the background; rank 0 calls it.

        Args:
            publication: What to do then.
            world_size: The number of ranks.
            plans: By rank, the last ones known; takes those that come.
            begin: When the save began, by `time.perf_counter`.
        """
        self._is_published = False
        self._start(lambda: self._publish(publication, world_size, plans, begin))

    @property
    def is_done(self) -> bool:
        """Whether this rank has nothing left to do."""
        return not any(thread.is_alive() for thread in self._threads)

    def wait(self, on_progress: OnProgress) -> bool:
        """Waits until it is done; says whether it went well, on rank 0 for all ranks.

        Args:
            on_progress: Called after each part that is written here, and again and again while
                others are waited for: each rank answers for its own part.
        """
        seen = -1
        for thread in self._threads:
            while thread.is_alive():
                thread.join(_PAUSE_SECONDS)
                if self._num_parts != seen:
                    on_progress()
                seen = self._num_parts
        if self._is_published is None:
            self._box.wait_for_end(on_progress, self._is_cancelled.is_set)
            return self._is_written
        return self._is_published

    def forget(self) -> None:
        """Removes rank 0's word that it is done, which every rank has heard."""
        if self._is_published is not None:
            self._box.forget()

    def cancel(self) -> None:
        """Stops waiting for ranks that will not report; what is being written is written."""
        self._is_cancelled.set()

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name="checkpoint-save", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _count(self) -> None:
        self._num_parts += 1

    def _write(self, write: Write, rank: int, plan: Plan | None) -> None:
        lower_thread_priority()
        try:
            report = Report(files=write(self._count), plan=plan)
        except BaseException as error:
            report = Report(error=f"rank {rank}: {reason(error)}", plan=plan)
        self._is_written = report.error is None
        self._box.put(rank, report)

    def _publish(
        self, publication: Publication, world_size: int, plans: dict[int, Plan], begin: float
    ) -> None:
        lower_thread_priority()
        try:
            reports = self._box.wait_for_all(world_size, self._count, self._is_cancelled.is_set)
            plans.update(
                {
                    rank: report.plan
                    for rank, report in enumerate(reports)
                    if report.plan is not None
                }
            )
            errors = [report.error for report in reports if report.error is not None]
            if errors:
                raise RuntimeError("; ".join(errors[:3]))
            publication.run(reports, [plans[rank] for rank in range(world_size)])
        except BaseException as error:
            log_failure(publication.final, error)
            shutil.rmtree(publication.beside, ignore_errors=True)
            return
        finally:
            self._box.end()
        self._is_published = True
        logger.info("saved %s in %.2f s", publication.final, time.perf_counter() - begin)
        publication.prune()


def reason(error: BaseException) -> str:
    """What the system said, in a line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__cause__ or cause.__context__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def log_failure(final: Path, error: BaseException) -> None:
    """Says that a save failed and what follows from it."""
    folder = final.parent
    logger.error(
        "saving %s failed: %s (%.1f GB free there); the previous checkpoint is untouched, training "
        "goes on and the next save tries again",
        final,
        reason(error),
        shutil.disk_usage(folder).free / 1e9 if folder.exists() else 0.0,
    )
