"""Tests a run whose data and checkpoints lie on an S3 server, on two nodes one after the other."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from object_store import SECRET, ObjectStore
from tiny_run import TinyRun

pytestmark = pytest.mark.slow
URL = "s3://corpora/runs/a"


def train(
    config: Path, folder: Path, store: ObjectStore, *flags: str, num_processes: int = 1
) -> Any:
    """Trains on a node that has only ``folder``, with its own cache."""
    environment = {
        **os.environ,
        **store.environment,
        "MEGATRON_CHATFLOW_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    save = ["--save", str(folder / "run"), "--load", str(folder / "run"), "--save-interval", "4"]
    command = [sys.executable, "-m", "megatron_chatflow.pretrain", "--config", str(config)]
    if num_processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command = [sys.executable, *launcher, str(num_processes), *command[1:]]
    return subprocess.run(
        [*command, *save, *flags], env=environment, capture_output=True, text=True, timeout=300
    )


def rows(folder: Path, key: str) -> list[dict[str, Any]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if key in row]


def losses(folder: Path) -> dict[int, float]:
    return {row["iteration"]: row["lm_loss"] for row in rows(folder, "lm_loss")}


@pytest.fixture
def remote_yaml(tiny_run: TinyRun, object_store: ObjectStore, tmp_path: Path) -> Path:
    settings = yaml.safe_load(tiny_run.config.read_text())
    for source in settings["data"]["sources"].values():
        prefix = Path(source["paths"][0])
        for suffix in (".bin", ".idx"):
            object_store.put(
                f"tokens/{prefix.name}{suffix}", prefix.with_suffix(suffix).read_bytes()
            )
        source["paths"] = [f"s3://corpora/tokens/{prefix.name}"]
    path = tmp_path / "remote.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_run_continues_on_another_node_with_the_same_losses(
    remote_yaml: Path, tiny_run: TinyRun, object_store: ObjectStore, tmp_path: Path
) -> None:
    object_store.proxy.fail_next(10_000, None, 30_000, 0)
    local = train(tiny_run.config, tmp_path / "local", object_store)
    assert local.returncode == 0, local.stderr
    flags = ["--save-remote", URL, "--save-retain", "1"]
    first = train(remote_yaml, tmp_path / "a", object_store, *flags, "--exit-interval", "4")
    assert first.returncode == 0, first.stderr
    assert [row["upload"]["status"] for row in rows(tmp_path / "a", "upload")][-1] == "uploaded"
    config = (tmp_path / "a" / "run" / "config.yaml").read_text()
    assert "s3://corpora/tokens/first_text_document" in config and SECRET not in config
    kept = {name.split("/")[2] for name in object_store.names() if "/iter_" in name}
    assert kept == {"iter_0000004"}

    shutil.rmtree(tmp_path / "a")
    second = train(remote_yaml, tmp_path / "b", object_store, *flags)
    assert second.returncode == 0, second.stderr
    assert f"copied iteration 4 from {URL}" in second.stderr
    assert losses(tmp_path / "b") == losses(tmp_path / "local")
    assert object_store.get("runs/a/latest_checkpointed_iteration.txt") == b"10\n"
    assert SECRET not in second.stderr

    # Another run cannot take the folder on the store.
    other = train(remote_yaml, tmp_path / "c", object_store, *flags, "--load", "none")
    assert other.returncode == 2
    assert "contains checkpoints of another run" in other.stderr
    # The checkpoint also loads from the store by itself, on several processes.
    flags = ["--load", URL, "--finetune", "--save-remote", "s3://corpora/runs/d"]
    tuned = train(remote_yaml, tmp_path / "d", object_store, *flags, num_processes=2)
    assert tuned.returncode == 0, tuned.stderr
    assert object_store.get("runs/d/latest_checkpointed_iteration.txt") == b"10\n"


def test_a_run_whose_last_upload_fails_says_so_and_is_repaired_by_the_same_command(
    remote_yaml: Path, object_store: ObjectStore, tmp_path: Path
) -> None:
    flags = ["--save-remote", URL, "--train-iters", "6"]

    def cut_the_network() -> None:
        while not (tmp_path / "a" / "run" / "iter_0000004").exists():
            time.sleep(0.01)
        object_store.proxy.go_down()

    cutter = threading.Thread(target=cut_the_network, daemon=True)
    cutter.start()
    failed = train(remote_yaml, tmp_path / "a", object_store, *flags)
    cutter.join()
    assert failed.returncode == 2
    assert "the last checkpoint could not be uploaded: cannot" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert len(losses(tmp_path / "a")) == 6  # training went on
    last = rows(tmp_path / "a", "upload")[-1]["upload"]
    assert last["status"] == "failed" and "s3://corpora/runs/a" in last["error"]

    object_store.proxy.is_down = False
    repaired = train(remote_yaml, tmp_path / "a", object_store, *flags)
    assert repaired.returncode == 0, repaired.stderr
    assert object_store.get("runs/a/latest_checkpointed_iteration.txt") == b"6\n"
    for name in ("iter_0000004", "iter_0000006"):
        local = {path.name for path in (tmp_path / "a" / "run" / name).iterdir()}
        top = f"runs/a/{name}/"
        found = {n.removeprefix(top) for n in object_store.names() if n.startswith(top)}
        assert local <= {one.split("/")[0] for one in found}
        assert "upload.json" not in found
