"""Tests that a checkpoint with a code payload is refused and the payload is not executed."""

import os
import pickle
from pathlib import Path

import jobs
import pytest
from tiny_run import TinyRun

from megatron_chatflow.checkpoint.index import read_index
from megatron_chatflow.errors import UserError


class _Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.distributed
def test_payloads_are_not_executed(tiny_run: TinyRun, tmp_path: Path) -> None:
    run, mark = tmp_path / "run", tmp_path / "mark"
    command = jobs.pretrain("--config", tiny_run.config, "--save", run, "--load", run)
    jobs.run([*command, "--exit-interval", "2"])
    checkpoint = run / "iter_0000002"
    for name in (".metadata", "common.pt"):
        path = checkpoint / name
        good = path.read_bytes()
        path.write_bytes(pickle.dumps(_Payload(mark)))
        output = jobs.run(command, expect=2)
        assert not mark.exists(), f"{name} was executed: {output}"
        path.write_bytes(good)
    jobs.run(command)


def test_the_index_takes_only_what_belongs_there(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for content in (pickle.dumps(_Payload(mark)), pickle.dumps({}), b"", b"garbage"):
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(UserError, match=r"\.metadata: is damaged"):
            read_index(tmp_path)
    assert not mark.exists()
