"""A save after its bytes are copied: this rank's file, and on rank 0 the checkpoint's publication.

In: a staged file and what rank 0 adds to it. Out: a folder under its final name, or nothing. One
thread of every rank writes its file and reports; a thread of rank 0 waits for the reports and then
writes the index and the run's state, renames the folder, and moves ``latest``.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_chatflow.checkpoint.direct_file import FileHash, hash_file, yield_to_training
from megatron_chatflow.checkpoint.files import LATEST, prune
from megatron_chatflow.checkpoint.manifest import MANIFEST, manifest_text
from megatron_chatflow.checkpoint.reports import Report, ReportBox
from megatron_chatflow.checkpoint.shard_plan import Plan, index_files
from megatron_chatflow.files import fsync_path, sync_folder, write_atomically

logger = logging.getLogger(__name__)

Progress = Callable[[], None]
Write = Callable[[Progress], dict[str, FileHash]]
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
            path.write_bytes(content)
            fsync_path(path)
            hashes[name] = hash_file(path)
            folders |= set(path.parents[: name.count("/")])
        for folder in folders:
            sync_folder(folder)
        (self.beside / MANIFEST).write_text(manifest_text(hashes), encoding="utf-8")
        fsync_path(self.beside / MANIFEST)
        sync_folder(self.beside)
        replaced = self.root / f".{self.final.name}.removed"
        if self.final.exists():
            # The same iteration saved again, after a resume from an earlier one.
            shutil.rmtree(replaced, ignore_errors=True)
            self.final.rename(replaced)
        self.beside.rename(self.final)
        sync_folder(self.root)
        shutil.rmtree(replaced, ignore_errors=True)
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
        box: ReportBox,
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

    def wait(self, on_progress: Progress) -> bool:
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
        yield_to_training()
        try:
            report = Report(files=write(self._count), plan=plan)
        except BaseException as error:
            report = Report(error=f"rank {rank}: {reason(error)}", plan=plan)
        self._is_written = report.error is None
        self._box.put(rank, report)

    def _publish(
        self, publication: Publication, world_size: int, plans: dict[int, Plan], begin: float
    ) -> None:
        yield_to_training()
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
