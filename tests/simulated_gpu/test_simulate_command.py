"""Tests ``--dry-run --simulate`` as a user calls it, and that training never imports it."""

import ast
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from fork_server import run_forked
from simulator import EXAMPLES, ROOT, Simulator, example
from tiny_run import TinyRun

from megatron_chatflow.errors import UserError
from megatron_chatflow.simulate import shim
from megatron_chatflow.simulate.report import format_ranges, merge_equal
from megatron_chatflow.simulate.run import (
    rank_classes,
    read_observations,
    run_ranks,
    simulate,
)
from megatron_chatflow.simulate.worker import Failure, Request

SMALL = ("--num-layers", "2", "--hidden-size", "256", "--ffn-hidden-size", "704")
SMALL = (*SMALL, "--num-attention-heads", "8", "--num-query-groups", "8", "--seq-length", "512")
SMALL = (*SMALL, "--max-position-embeddings", "512")
SMALL = (*SMALL, "--tensor-model-parallel-size", "2", "--sequence-parallel")
TENSOR = ("--tensor-model-parallel-size", "2")


def run_command(*arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "megatron_chatflow.pretrain", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Simulates a small model of the page with tensor parallelism, without its data."""
    output = tmp_path_factory.mktemp("report") / "r.json"
    command = [*("--config", EXAMPLES / "7b.yaml", *SMALL, "--preset", "none", "--dry-run")]
    command += [*TENSOR, "--sequence-parallel"]
    done = run_command(*command, "--simulate", "--world-size", 8, "--output", output)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(output.read_text())


def test_the_report_says_what_was_generated(report: tuple[str, dict[str, Any]]) -> None:
    text, content = report
    assert "data/tokenizer.model is missing: a generated tokenizer of 32,000 pieces" in text
    assert content["vocab_size"] == 32_000
    assert "executes 2 of the 64 micro-batches" in text
    assert "validates english and instruction only" in text
    implementations = content["ranks"][0]["implementations"]
    assert implementations["layers"].startswith("megatron-core's own linear layers; not transf")
    assert {"attention", "precision", "optimizer"} <= implementations.keys()
    assert all(part in text and what in text for part, what in implementations.items())
    assert content["micro_batches"] == {"per_step": 64, "executed": 2}
    assert content["gpu"]["key"] == "h100" and content["layout"]["data"] == 4


def test_the_report_accounts_for_a_rank(report: tuple[str, dict[str, Any]]) -> None:
    _, content = report
    (rank,) = content["ranks"]
    assert rank["stands_for"] == [0]
    memory = rank["memory"]
    kinds = ("weights", "gradients", "optimizer", "activations", "temporary")
    assert sum(memory[kind] for kind in kinds) == memory["peak_bytes"]
    layer = 256 * (4 * 256 + 3 * 704) // 2 + 2 * 256
    parameters = 2 * 32_000 * 256 // 2 + 2 * layer + 256
    # Buffers are padded, and the optimizer's state is divided among 4 ranks.
    assert memory["weights"] == pytest.approx(2 * parameters, rel=1e-3)
    assert memory["gradients"] == pytest.approx(4 * parameters, rel=1e-3)
    assert memory["optimizer"] == pytest.approx(12 * parameters / 4, rel=1e-3)
    assert any("fusions/fused_bias_swiglu.py" in one["line"] for one in memory["holders"])
    tokens = 64 * 512
    products = 6 * tokens * (2 * (layer - 2 * 256) + 32_000 * 256 // 2)
    attention = 14 * 2 * tokens * 512 * 256 // 2  # the backward pass computes scores again
    assert rank["flops_per_step"]["total"] == pytest.approx(products + attention, rel=1e-6)
    assert rank["cpu_tensors"] == []
    sent = {
        (one["group"], one["collective"]): one["num_bytes"] for one in rank["messages_per_step"]
    }
    assert ("optimizer (8)", "all-reduce") in sent  # the norm of the gradient
    assert not [group for group, _ in sent if group.startswith("other")]
    assert sent["data (4)", "reduce-scatter"] == pytest.approx(4 * parameters, rel=1e-3)
    assert sent["data (4)", "all-gather"] == pytest.approx(2 * parameters, rel=1e-3)


def test_mistakes_of_the_user_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = example("7b.yaml")
    with pytest.raises(UserError, match="--gpu: 'v100' is not known; use one of a100-80, h100"):
        simulate(config, gpu="v100", world_size=8)
    with pytest.raises(UserError, match="--rank: '8' is neither stages nor all-distinct nor a ra"):
        simulate(config, gpu="h100", world_size=8, ranks="8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"no C\+\+ compiler was found \(CXX=no-such-compiler\)"):
        shim.library_path()


def test_ranks_that_differ_are_selected() -> None:
    sizes = "--pipeline-model-parallel-size 2 --context-parallel-size 2"
    config = example("7b.yaml", *TENSOR, *sizes.split())
    assert rank_classes(config, 32, "stages") == {0: (0,), 16: (16,)}
    assert rank_classes(config, 32, "7") == {7: (7,)}
    in_stage = {
        0: (0, 1, 4, 5, 8, 9),
        2: (2, 3, 6, 7, 10, 11),
        12: (12, 13),
        14: (14, 15),
    }
    expected = in_stage | {
        16 + rank: tuple(16 + one for one in ranks) for rank, ranks in in_stage.items()
    }
    assert rank_classes(config, 32, "all-distinct") == expected


@pytest.mark.slow
def test_ranks_of_a_class_do_the_same(simulator: Simulator) -> None:
    flags = "--sequence-parallel --context-parallel-size 2 --num-layers 1 --vocab-size 32000"
    config = example("7b.yaml", *TENSOR, *flags.split())
    classes = rank_classes(config, 12, "all-distinct")
    assert sorted(map(len, classes.values())) == [2, 2, 4, 4]
    for ranks in classes.values():
        found = [(simulator.observe(config, world_size=12, rank=rank), (rank,)) for rank in ranks]
        assert [merged for _, merged in merge_equal(found)] == [ranks]


def test_rows_name_their_ranks() -> None:
    assert format_ranges([3]) == "3"
    assert format_ranges([0, 1, 2, 3, 8]) == "0-3, 8"
    assert format_ranges(range(0, 16, 2)) == "0, 2, 4, 6, ... (8)"


def test_the_rank_that_failed_is_named(tmp_path: Path) -> None:
    failure = Failure("ValueError: too wide", "megatron_chatflow/x.py:1 f", "")
    (tmp_path / "rank_4.json").write_text(json.dumps({"failure": asdict(failure)}))
    (tmp_path / "rank_4.log").write_text("a log\n")
    (tmp_path / "worker.log").write_text("ImportError: no x\n")
    request = Request("run.yaml", "h100", 12, (0, 4), str(tmp_path))  # 0 was not started
    with pytest.raises(UserError, match="simulated rank 4: megatron_chatflow/x.py:1 f: ValueErr"):
        read_observations(request, tmp_path / "worker.log")
    request = Request("run.yaml", "h100", 12, (0,), str(tmp_path))
    with pytest.raises(UserError, match="the simulation did not start: ImportError: no x"):
        read_observations(request, tmp_path / "worker.log")


def test_processes_that_outlive_the_worker_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker = tmp_path / "worker"
    worker.write_text(f"#!/bin/bash\nsleep 120 & echo $! > {tmp_path}/other\necho no x\nexit 1\n")
    worker.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(worker))
    request = Request("run.yaml", "h100", 8, (0,), str(tmp_path))
    with pytest.raises(UserError, match="the simulation did not start: no x"):
        run_ranks(tmp_path / "libguard.so", request)
    os.kill(int((tmp_path / "other").read_text()), signal.SIGKILL)  # it must still run


def test_training_never_imports_the_simulation(tiny_run: TinyRun, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        "from megatron_chatflow.config import load_config\n"
        "from megatron_chatflow.pretrain import train\n"
        "train(load_config(sys.argv[1], ['--train-iters', '2']))\n"
        "assert 'megatron_chatflow.training.loop' in sys.modules\n"
        "assert not [name for name in sys.modules if 'simulate' in name]\n"
    )
    done = run_forked([script, tiny_run.config])
    assert done.returncode == 0, done.stderr


def test_only_dry_runs_and_commands_import_the_simulation() -> None:
    for path in sorted((ROOT / "megatron_chatflow").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.parent.name in ("simulate", "cli") or "megatron_chatflow.simulate" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "megatron_chatflow.simulate"
            ):
                assert path.name == "pretrain.py" and node.col_offset > 0
