"""How ranks tell rank 0 that their part of a checkpoint is on the disk, without a collective.

In: a report of each rank. Out: all of them, on rank 0. They go through the job's key-value store,
which threads may use while training's own collectives run.
"""

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.distributed.distributed_c10d import _get_default_store

from megatron_chatflow.checkpoint.direct_file import FileHash
from megatron_chatflow.checkpoint.shard_plan import Plan

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


class ReportBox:
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


def name_of_job(device: torch.device) -> str:
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
