"""Tests runs that save and resume on a simulated GPU, with real files of a made-up run."""

from pathlib import Path
from typing import Any

import pytest
from simulator import Simulator, write_config
from tiny_run import TinyRun

from megatron_chatflow.checkpoint.files import LATEST
from megatron_chatflow.simulate.observer import Observation

IN_SOME = {"gradients"}
"""Phases in which only megatron-core before 0.18 makes the host wait."""
PARALLEL = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}


def write_run(
    tiny_run: TinyRun, folder: Path, num_iterations: int, *, is_async: bool, **parallel: Any
) -> Path:
    return write_config(
        folder / f"until_{num_iterations}.yaml",
        tiny_run.config,
        {
            "model": {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 352},
            "parallel": {**PARALLEL, **parallel},
            "train": {
                "bf16": True,
                "train_iters": num_iterations,
                "global_batch_size": 4,
                "eval_interval": 2,
            },
            "checkpoint": {
                "save": str(folder / "run"),
                "load": str(folder / "run"),
                "save_interval": 1,
                "async_save": is_async,
                "from_scratch": True,
            },
            "logging": {"log_straggler": True},
        },
    )


def test_a_run_saves_and_resumes(simulator: Simulator, tiny_run: TinyRun, tmp_path: Path) -> None:
    first = simulator.run_file(write_run(tiny_run, tmp_path, 2, is_async=True))
    assert isinstance(first, Observation), first
    assert first.num_steps == 2
    assert (tmp_path / "run" / LATEST).read_text() == "2\n"
    assert (tmp_path / "run" / "iter_0000001" / "metadata.json").exists()

    second = simulator.run_file(write_run(tiny_run, tmp_path, 4, is_async=True))
    assert isinstance(second, Observation), second
    assert second.num_steps == 2
    assert (tmp_path / "run" / LATEST).read_text() == "4\n"
    # A resumed run holds the same state as the first one, and its steps wait in the same places.
    # Activations depend on the documents of the samples.
    for kind in ("weights", "gradients", "optimizer"):
        assert second.memory[kind] == first.memory[kind]
    places = [
        {one.lines[0] for one in run.synchronizations if one.phase != "after"}
        for run in (first, second)
    ]
    assert places[0] == places[1]
    for run in (first, second):
        assert run.cpu_tensors == []
        assert {one.phase for one in run.synchronizations} - IN_SOME == {"update", "after"}


def test_a_run_saves_at_once(simulator: Simulator, tiny_run: TinyRun, tmp_path: Path) -> None:
    run = simulator.run_file(write_run(tiny_run, tmp_path, 2, is_async=False))
    assert isinstance(run, Observation), run
    assert (tmp_path / "run" / LATEST).read_text() == "2\n"
    assert run.cpu_tensors == []


def run_job(simulator: Simulator, config: Path, world_size: int) -> list[Observation]:
    found = simulator.run_job(config, world_size=world_size)
    observations = [one for one in found if isinstance(one, Observation)]
    assert len(observations) == world_size, found
    assert all(one.cpu_tensors == [] for one in observations)
    return observations


def test_the_ranks_of_a_job_save_and_resume_at_another_layout(
    simulator: Simulator, tiny_run: TinyRun, tmp_path: Path
) -> None:
    tensor = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    first = run_job(simulator, write_run(tiny_run, tmp_path, 2, is_async=True, **tensor), 4)
    assert [one.place["data"] for one in first] == [0, 0, 1, 1]
    assert (tmp_path / "run" / LATEST).read_text() == "2\n"
    checkpoint = tmp_path / "run" / "iter_0000002"
    assert sorted(path.name for path in checkpoint.glob("*.distcp")) == [
        f"__{rank}_0.distcp" for rank in range(4)
    ]
    # The ranks' files hold every tensor once: bf16 weights, and fp32 weights and two moments.
    num_bytes = sum(path.stat().st_size for path in checkpoint.glob("*.distcp"))
    weights = sum(one.memory["weights"] for one in first[:2])
    assert weights * 7 == pytest.approx(num_bytes, rel=0.05)

    stages = {"pipeline_model_parallel_size": 2}
    second = run_job(simulator, write_run(tiny_run, tmp_path, 4, is_async=False, **stages), 2)
    assert [one.num_steps for one in second] == [2, 2]
    assert (tmp_path / "run" / LATEST).read_text() == "4\n"
    for one in (*first, *second):
        assert {line.phase for line in one.synchronizations} - IN_SOME == {"update", "after"}
