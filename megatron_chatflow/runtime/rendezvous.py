"""A part of torchrun's store that only the workers of one attempt know.

In: the store that the agents keep for all attempts of a job. Out: the same store behind a prefix
that these very workers have agreed upon.

Since torch 2.5 the agents hand the same store to every restart and to every change of membership.
gloo finds the addresses of workers that are dead there, and the restarted job ends with "connection
refused". Neither the number of restarts nor the world's size tells two attempts apart (a change of
membership moves neither), so the workers make a name up: each writes a fresh random number, rank 0
reads all of them out as a roll, and only when every worker has signed one and the same roll, which
holds its own number, is that roll's hash the name. What a dead worker left behind can be read into
a roll, but a roll with a dead worker's number is never signed by all.
"""

import hashlib
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from megatron_chatflow.errors import UserError

_PAUSE_SECONDS = 0.02
_PREFIX = "megatron_chatflow"


def agree_on_prefix(store: Store, rank: int, world_size: int, timeout: timedelta) -> PrefixStore:
    """Waits for all workers of this attempt and gives them a part of the store of their own.

    Args:
        store: Shared with all workers, and with those of earlier attempts.
        rank: Of this worker.
        world_size: Workers of this attempt.
        timeout: For the slowest to arrive.

    Raises:
        UserError: Not all workers came in time.
    """
    common = PrefixStore(_PREFIX, store)
    number = uuid.uuid4().hex
    common.set(f"signature/{rank}", "")
    common.set(f"number/{rank}", number)
    deadline = time.monotonic() + timeout.total_seconds()
    caller = _Caller(common, world_size) if rank == 0 else None
    signed = ""
    while time.monotonic() < deadline:
        if caller is not None:
            caller.call()
        roll = _read(common, "roll").split(",")
        if len(roll) == world_size and roll[rank] == number:
            name = _name(roll)
            if name != signed:
                common.set(f"signature/{rank}", name)
                signed = name
        if signed and _read(common, "agreed") == signed:
            return PrefixStore(f"{_PREFIX}/{signed}", store)
        time.sleep(_PAUSE_SECONDS)
    raise UserError(
        f"rank {rank}: not all {world_size} processes came within {timeout}; see the logs of the "
        "other nodes (--distributed-timeout-minutes)"
    )


class _Caller:
    """Rank 0's part: reads the numbers out, and says when all have signed."""

    def __init__(self, store: Store, world_size: int) -> None:
        self._store = store
        self._numbers = [f"number/{rank}" for rank in range(world_size)]
        self._signatures = [f"signature/{rank}" for rank in range(world_size)]
        self._called: list[str] = []

    def call(self) -> None:
        if not self._store.check(self._numbers):
            return
        roll = [value.decode() for value in self._store.multi_get(self._numbers)]
        if roll != self._called:
            self._store.set("roll", ",".join(roll))
            self._called = roll
        name = _name(roll)
        if all(value.decode() == name for value in self._store.multi_get(self._signatures)):
            self._store.set("agreed", name)


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _name(roll: list[str]) -> str:
    return hashlib.sha256(",".join(roll).encode()).hexdigest()[:32]
