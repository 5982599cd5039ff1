"""Tests that the workers of one attempt agree on a name that no other attempt uses."""

import threading
import time
import uuid
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime.launch import resolve_attempt_store

_TIMEOUT = timedelta(minutes=10)


def _attempt(port: int, delays: list[float]) -> list[str]:
    """Returns what each worker of an attempt reads from rank 0. Each arrives after its delay."""
    found = [""] * len(delays)

    def join(rank: int) -> None:
        store = TCPStore("127.0.0.1", port, is_master=False, timeout=_TIMEOUT)
        time.sleep(delays[rank])
        own = resolve_attempt_store(store, rank, len(delays), _TIMEOUT)
        assert not own.check([f"from {rank}"]), "an earlier attempt wrote there"
        own.set(f"from {rank}", uuid.uuid4().hex)
        own.wait([f"from {k}" for k in range(len(delays))], _TIMEOUT)
        found[rank] = own.get("from 0").decode()

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(len(delays))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture(scope="module")
def server() -> TCPStore:
    """Starts the store that an agent keeps for all attempts."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.mark.parametrize(
    "delays", [[0.0, 0.0, 0.0], [0.3, 0.0, 0.1], [0.0, 0.2, 0.4], [0.0], [0.1, 0.0]]
)
def test_every_attempt_has_a_name_of_its_own(server: TCPStore, delays: list[float]) -> None:
    # The store still holds the keys of earlier attempts, in any order and number.
    attempts = [_attempt(server.port, delays) for _ in range(3)]
    assert all(len(set(found)) == 1 and found[0] for found in attempts)
    assert len({found[0] for found in attempts}) == 3


def test_workers_of_an_attempt_that_died_halfway_do_no_harm(server: TCPStore) -> None:
    store = TCPStore("127.0.0.1", server.port, is_master=False, timeout=_TIMEOUT)
    for rank in (0, 2):  # rank 1 never arrived
        with pytest.raises(UserError, match="not all 3 processes connected"):
            resolve_attempt_store(store, rank, 3, timedelta(seconds=0.2))
    found = _attempt(server.port, [0.2, 0.0, 0.1])
    assert len(set(found)) == 1 and found[0]
