"""Tests monitoring of real runs: slow ranks, complete profiles, and loggers that may fail."""

import gzip
import json
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import jobs
import pytest
from tiny_run import TinyRun

pytestmark = pytest.mark.slow

FAULTY = Path(__file__).with_name("faulty_worker.py")


@pytest.mark.distributed
def test_a_slow_rank_is_named_and_profiled(tiny_run: TinyRun, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fault = json.dumps({"slow": {"rank": 1, "seconds": 0.2}})
    flags = ["--config", tiny_run.config, "--save", folder, "--train-iters", 9]
    flags += ["--log-interval", 3, "--log-straggler", "--straggler-minmax-count", 2]
    flags += ["--profile", "--use-pytorch-profiler", "--profile-step-start", 2]
    flags += ["--profile-step-end", 4, "--profile-ranks", 0, 1]
    output = jobs.run([*jobs.forking_torchrun(2), FAULTY, fault, *flags])

    entries, _ = jobs.read_metrics(folder)
    assert [entry["iteration"] for entry in entries] == list(range(1, 10))
    compared = [entry for entry in entries if "stragglers" in entry]
    assert [entry["iteration"] for entry in compared] == [3, 6, 9]
    found = [entry["stragglers"] for entry in compared]
    assert Counter(one["slowest"][0]["rank"] for one in found).most_common(1)[0][0] == 1
    assert {len(one["slowest"]) for one in found} == {2}
    # Two micro-batches per iteration, and the rank sleeps before each.
    assert all(one["forward_seconds"]["max"] >= 0.4 for one in found)
    assert all(one["forward_seconds"]["max_rank"] == 1 for one in found)
    for one in found:
        for part in ("forward_seconds", "backward_seconds", "data_seconds"):
            assert 0 <= one[part]["min"] <= one[part]["median"] <= one[part]["max"]
    assert "stragglers " in output and "slowest ranks: 1 on " in output

    traces = sorted((folder / "profile").iterdir())
    names = [f"rank_{rank}_iterations_3_to_4.json.gz" for rank in (0, 1)]
    assert [path.name for path in traces] == names
    for path in traces:
        with gzip.open(path, "rt") as file:
            events = json.load(file)["traceEvents"]
        count = Counter(event.get("name") for event in events if event.get("ph") == "X")
        assert count["loading"] == count["forward and backward"] == count["optimizer"] == 2
        assert count["aten::mm"] or count["aten::addmm"] or count["aten::linear"]
        assert any("backward" in str(name).lower() for name in count)


@pytest.mark.distributed
def test_loggers_that_fail_end_nothing(tiny_run: TinyRun, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("tensorboard", "profile"):
        (folder / name).write_text("in the way")
    flags = ["--config", tiny_run.config, "--save", folder, "--train-iters", 4]
    flags += ["--profile", "--use-pytorch-profiler", "--profile-step-start", 1]
    output = jobs.run(jobs.pretrain(*flags, "--profile-step-end", 2))
    assert output.count("training continues without it") == 1
    assert "the profile of rank 0 could not be written" in output
    entries, _ = jobs.read_metrics(folder)
    assert len(entries) == 4
    lines = output.splitlines()
    at = next(number for number, line in enumerate(lines) if "  iter 2/4  loss " in line)
    for field in ("grad ", "lr ", " s  ", " tok/s", "MFU ", "ETA "):
        assert field in lines[at]
    # A line with the peak of memory may come before the table.
    head = ["source", "loss", "loss", "tokens", "share", "planned", "tokens", "epochs"]
    at += 1 if lines[at + 1].split() == head else 2
    assert lines[at].split() == head
    assert [line.split()[0] for line in lines[at + 1 : at + 4]] == ["first", "second", "all"]
    assert entries[0]["tokens_per_second_per_gpu"] == entries[0]["tokens_per_second"]


@pytest.mark.distributed
@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_a_run_goes_on_at_weights_and_biases(tiny_run: TinyRun, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    flags = ["--config", tiny_run.config, "--save", folder, "--load", folder, "--train-iters", 6]
    flags += ["--wandb-project", "chatflow", "--wandb-exp-name", "tiny"]
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    jobs.run(jobs.pretrain(*flags, "--exit-interval", 3), extra_environment=offline)
    jobs.run(jobs.pretrain(*flags), extra_environment=offline)
    known = (folder / "wandb_id.txt").read_text().strip()
    records = sorted((folder / "wandb").glob(f"offline-run-*-{known}/run-{known}.wandb"))
    assert len(records) == 2
    assert all(b"lm loss" in path.read_bytes() for path in records)


def _without(package: str) -> list[str]:
    """Returns the entry point's command for a process in which a package cannot be imported."""
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        f"u.find_spec = lambda name, *rest: None if name == {package!r} else find(name, *rest)\n"
        "from megatron_chatflow.errors import run_main\n"
        "from megatron_chatflow.pretrain import main; run_main(main)"
    )
    return [sys.executable, "-c", code]


@pytest.mark.distributed
def test_weights_and_biases_that_is_not_there(tiny_run: TinyRun, tmp_path: Path) -> None:
    flags = ["--config", tiny_run.config, "--save", tmp_path / "run", "--wandb-project", "x"]
    output = jobs.run([*_without("wandb"), *flags], expect=2)
    assert "error: rank 0: logging.wandb_project: wandb is not installed" in output
