"""Reports a fatal error once per node, in one line, and shuts the rank down.

A failing rank prints its error to standard error and leaves a note in the job's key-value store. A
rank that only lost its peers finds the note and names the rank that failed, instead of printing the
traceback of a failed collective.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store

from megatron_chatflow.errors import LocalError, UserError
from megatron_chatflow.runtime.ranks import PeerError, ProcessRank

_NOTE_TIMEOUT_SECONDS = 3.0
_EXIT_TIMEOUT_SECONDS = 3.0
_PAUSE_SECONDS = 0.02
_PREFIX = "megatron_chatflow/exit"
# Messages of gloo, NCCL, the store and the shared-memory group if a process is gone.
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "a process of this group has ended",
    "remote process exited",
    "communicator was aborted",
    "failed to recv, got 0 bytes",
)
# Messages if a process does not arrive, for whatever reason.
_LATE = ("Timed out", "timeout", "did not come to a collective in time", "Connection refused")
_TIMED_OUT = "a collective timed out"


class ExitReporter:
    """Reports the error that ends this process."""

    def __init__(self, process: ProcessRank) -> None:
        self._process = process
        self._host = os.uname().nodename
        # Two agents on one machine write separate logs.
        self._node = f"{self._host}/{os.environ.get('GROUP_RANK', '')}"
        self._store: Any = None
        self._has_reported = False

    def report(self, error: BaseException) -> bool:
        """Reports why this rank ends, unless another rank of its node has reported the same.

        Returns whether the error was reported, as user errors and lost peers are. Any other error
        must be raised again to show its traceback.
        """
        self._has_reported = True
        self._store = self._open_store()
        lost = _lost_peers(error)
        if lost is not None:
            is_certain = lost != _TIMED_OUT
            note = self._find_note(_NOTE_TIMEOUT_SECONDS if is_certain else 0.0)
            if note is None and not is_certain:
                return self._record_fault(error)
            self._print_once("lost", self._describe_lost(note, lost))
            return True
        if not isinstance(error, UserError):
            return self._record_fault(error)
        text = " ".join(str(error).split())
        if isinstance(error, PeerError):
            note = self._find_note(_NOTE_TIMEOUT_SECONDS)
            self._print_once("lost", self._describe_lost(note, text))
            return True
        rank = f"rank {self._process.rank}: " if isinstance(error, LocalError) else ""
        self._write_note(text)
        self._print_once(text, rank + text)
        return True

    def wait(self) -> None:
        """Waits until the other ranks have reported, as torchrun kills them once one has exited."""
        if not self._has_reported or self._store is None:
            return
        deadline = time.monotonic() + _EXIT_TIMEOUT_SECONDS
        with contextlib.suppress(Exception):
            self._store.add("left", 1)
            while self._store.add("left", 0) < self._process.world_size:
                if time.monotonic() >= deadline:
                    return
                time.sleep(_PAUSE_SECONDS)

    def _open_store(self) -> Any:
        """Opens the job's store, or that of torchrun's agent if the job was never initialized."""
        with contextlib.suppress(Exception):
            if torch.distributed.is_initialized():
                return PrefixStore(_PREFIX, _get_default_store())
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                agent = torch.distributed.TCPStore(  # type: ignore[attr-defined]
                    os.environ["MASTER_ADDR"],
                    int(os.environ["MASTER_PORT"]),
                    is_master=False,
                    timeout=timedelta(seconds=_EXIT_TIMEOUT_SECONDS),
                )
                attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                return PrefixStore(f"{_PREFIX}/{attempt}", agent)
        return None

    def _print_once(self, what: str, line: str) -> None:
        """Prints a line unless ``what`` was printed on this node; always prints without a store."""
        # A message may contain a file name that is not UTF-8.
        printed = f"{self._node}\0{what}".encode(errors="surrogatepass")
        key = hashlib.sha256(printed).hexdigest()[:32]
        is_first = True
        with contextlib.suppress(Exception):
            is_first = self._store is None or self._store.add(f"printed/{key}", 1) == 1
        if is_first:
            print(f"error: {line}", file=sys.stderr, flush=True)

    def _describe_lost(self, note: Mapping[str, Any] | None, reason: str) -> str:
        mine = f"rank {self._process.rank}: "
        if note is None:
            return (
                f"{mine}exiting because its peers are gone ({reason}); check the logs of the "
                "other ranks"
            )
        failed = f"{mine}exiting because rank {note['rank']}"
        if note["node"] == self._node:
            return f"{failed} failed; see its error"
        return f"{failed} on {note['host']} failed: {note['text']}"

    def _record_fault(self, error: BaseException) -> bool:
        words = str(error).strip().splitlines() or [""]
        self._write_note(f"{type(error).__name__}: {words[0]}")
        return False

    def _write_note(self, text: str) -> None:
        note = {"rank": self._process.rank, "node": self._node, "host": self._host, "text": text}
        with contextlib.suppress(Exception):
            # Only the first note is kept, because later errors may be its consequences.
            self._store.compare_set("note", "", json.dumps(note))

    def _find_note(self, timeout_seconds: float) -> Mapping[str, Any] | None:
        """Returns the first note of another rank, waiting for it if necessary."""
        deadline = time.monotonic() + timeout_seconds
        with contextlib.suppress(Exception):
            while not self._store.check(["note"]):
                if time.monotonic() >= deadline:
                    return None
                time.sleep(_PAUSE_SECONDS)
            note: dict[str, Any] = json.loads(self._store.get("note"))
            return note
        return None


def _lost_peers(error: BaseException) -> str | None:
    """Returns why ``error`` means that peers are gone, or `_TIMED_OUT` if they may be, or None."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, RuntimeError):
            text = " ".join(str(cause).split())
            for words in _LOST:
                if words in text:
                    return words
            if any(words in text for words in _LATE):
                return _TIMED_OUT
        cause = cause.__cause__
    return None
