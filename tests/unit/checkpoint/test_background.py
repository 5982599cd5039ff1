"""Who waits for a save says that it gets on while parts of it are written, and not otherwise."""

import threading
import time

import torch

from megatron_chatflow.checkpoint.background import BackgroundSave, Progress
from megatron_chatflow.checkpoint.direct_file import FileHash
from megatron_chatflow.checkpoint.reports import ReportBox


def test_waiting_tells_of_every_part(monkeypatch) -> None:
    store = torch.distributed.HashStore()
    monkeypatch.setattr("megatron_chatflow.checkpoint.reports._get_default_store", lambda: store)
    gates = [threading.Event() for _ in range(3)]

    def write(progress: Progress) -> dict[str, FileHash]:
        for gate in gates:
            gate.wait()
            progress()
        return {}

    box = ReportBox("a save")
    save = BackgroundSave(7, write, box, 1, None)
    told = []
    results = []
    waiting = threading.Thread(target=lambda: results.append(save.wait(lambda: told.append(1))))
    waiting.start()
    _until(lambda: len(told) == 1)  # that it began
    for number, gate in enumerate(gates[:2], 1):
        gate.set()
        _until(lambda expected=number + 1: len(told) == expected)
        time.sleep(0.5)
        assert len(told) == number + 1, "a writer that stands still is told of"
    gates[2].set()
    seen = len(told)
    _until(lambda: len(told) > seen + 5)  # rank 0, which publishes, is waited for
    assert not results
    box.end()
    waiting.join(60)
    assert results == [True]


def _until(is_true) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
