"""How a rank leaves a job that cannot go on: every mistake is said once a node, in one line.

In: what ended this rank. Out: a line on standard error, and a note for the other ranks in the
job's key-value store. A rank that only lost its peers finds their note there and says whom it
follows, instead of a traceback of a collective that failed.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store

from megatron_chatflow.errors import LocalError, UserError
from megatron_chatflow.runtime.ranks import PeerError, ProcessRank

_SECONDS_FOR_NOTES = 3.0
_SECONDS_FOR_OTHERS = 3.0
_PAUSE_SECONDS = 0.02
_PREFIX = "megatron_chatflow/exit"
# What gloo, NCCL, the store and our shared memory say of a process that is gone.
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "a process of this group has ended",
    "remote process exited",
    "communicator was aborted",
    "failed to recv, got 0 bytes",
)
# What they say of one that does not come, for whatever reason.
_LATE = ("Timed out", "timeout", "did not come to a collective in time", "Connection refused")


@dataclass(frozen=True)
class _Note:
    """What a rank leaves behind."""

    rank: int
    node: str
    host: str
    text: str


class ExitReporter:
    """The last words of this process."""

    def __init__(self, process: ProcessRank) -> None:
        """Takes this process's place."""
        self._process = process
        self._host = os.uname().nodename
        # Two agents on one machine have logs of their own.
        self._node = f"{self._host}/{os.environ.get('GROUP_RANK', '')}"
        self._store: Any = None
        self._has_left = False

    def report(self, error: BaseException) -> bool:
        """Says why this rank ends, unless another of its node has said just that.

        Args:
            error: What ended it.

        Returns:
            Whether all is said: a mistake, or lost peers. A fault of ours keeps its traceback.
        """
        self._has_left = True
        self._store = self._open_store()
        lost = _lost_peers(error)
        if lost is not None:
            note = self._find_note(_SECONDS_FOR_NOTES if lost.is_certain else 0.0)
            if note is None and not lost.is_certain:
                return self._leave_fault(error)
            self._print_once("lost", self._whom(note, lost.text))
            return True
        if not isinstance(error, UserError):
            return self._leave_fault(error)
        text = " ".join(str(error).split())
        if isinstance(error, PeerError):
            self._print_once("lost", self._whom(self._find_note(_SECONDS_FOR_NOTES), text))
            return True
        rank = f"rank {self._process.rank}: " if isinstance(error, LocalError) else ""
        self._leave_note(text)
        self._print_once(text, rank + text)
        return True

    def wait(self) -> None:
        """Lets the others have their say: a launcher ends them as soon as one is gone."""
        if not self._has_left or self._store is None:
            return
        deadline = time.monotonic() + _SECONDS_FOR_OTHERS
        with contextlib.suppress(Exception):
            self._store.add("left", 1)
            while self._store.add("left", 0) < self._process.world_size:
                if time.monotonic() >= deadline:
                    return
                time.sleep(_PAUSE_SECONDS)

    def _open_store(self) -> Any:
        """The job's own store, or that of torchrun's agent if the job never came together."""
        with contextlib.suppress(Exception):
            if torch.distributed.is_initialized():
                return PrefixStore(_PREFIX, _get_default_store())
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                agent = torch.distributed.TCPStore(  # type: ignore[attr-defined]
                    os.environ["MASTER_ADDR"],
                    int(os.environ["MASTER_PORT"]),
                    is_master=False,
                    timeout=timedelta(seconds=_SECONDS_FOR_OTHERS),
                )
                attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                return PrefixStore(f"{_PREFIX}/{attempt}", agent)
        return None

    def _print_once(self, what: str, line: str) -> None:
        """Prints a line unless ``what`` was said on this node; without a store it is said."""
        # A message may name a file whose name is no UTF-8.
        said = f"{self._node}\0{what}".encode(errors="surrogatepass")
        key = hashlib.sha256(said).hexdigest()[:32]
        is_first = True
        with contextlib.suppress(Exception):
            is_first = self._store is None or self._store.add(f"said/{key}", 1) == 1
        if is_first:
            print(f"error: {line}", file=sys.stderr, flush=True)

    def _whom(self, note: _Note | None, reason: str) -> str:
        """Whom this rank follows."""
        mine = f"rank {self._process.rank}: "
        if note is None:
            return f"{mine}ends, its peers are gone ({reason}); see what ended them"
        if note.node == self._node:
            return f"{mine}ends with rank {note.rank}, which says why"
        return f"{mine}ends with rank {note.rank} on {note.host}, which said: {note.text}"

    def _leave_fault(self, error: BaseException) -> bool:
        words = str(error).strip().splitlines() or [""]
        self._leave_note(f"{type(error).__name__}: {words[0]}")
        return False

    def _leave_note(self, text: str) -> None:
        note = {"rank": self._process.rank, "node": self._node, "host": self._host, "text": text}
        with contextlib.suppress(Exception):
            # The first alone is kept: what came later may follow from it.
            self._store.compare_set("note", "", json.dumps(note))

    def _find_note(self, timeout_seconds: float) -> _Note | None:
        """The first note of another rank; waits for one to be written."""
        deadline = time.monotonic() + timeout_seconds
        with contextlib.suppress(Exception):
            while not self._store.check(["note"]):
                if time.monotonic() >= deadline:
                    return None
                time.sleep(_PAUSE_SECONDS)
            return _Note(**json.loads(self._store.get("note")))
        return None


@dataclass(frozen=True)
class _Loss:
    """A collective that failed for want of the others; ``is_certain`` if they are gone."""

    text: str
    is_certain: bool


def _lost_peers(error: BaseException) -> _Loss | None:
    """What a collective said, if that is what ended this rank."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, RuntimeError):
            text = " ".join(str(cause).split())
            for words in _LOST:
                if words in text:
                    return _Loss(words, is_certain=True)
            if any(words in text for words in _LATE):
                return _Loss("waited in vain", is_certain=False)
        cause = cause.__cause__
    return None
