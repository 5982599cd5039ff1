"""Tests when a deadline without heartbeats has passed, and a watchdog without a timeout."""

import threading

import pytest

from megatron_chatflow.runtime.watchdog import Deadline, Watchdog


def test_patience_ends_without_beats_alone() -> None:
    deadline = Deadline(1.0)
    assert not any(deadline.has_passed(0.4, call // 2) for call in range(2, 99))
    assert [deadline.has_passed(0.4, 49) for _ in range(3)] == [False, False, True]
    assert deadline.waited == pytest.approx(1.2)
    assert not deadline.has_passed(0.4, 50)


def test_no_timeout_watches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread))
    watchdog = Watchdog(timeout_seconds=0, rank=0, world_size=1, folder=None)
    watchdog.enter_phase(1, "training")
    watchdog.close()
    assert not started
