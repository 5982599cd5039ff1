"""Simulates ranks of a run on GPUs that are not there: the part of a dry run behind ``--simulate``.

The ranks are simulated by `worker` in a process of its own, so that nothing of this process ever
believes in the GPU.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_chatflow.config import RunConfig, validate_for_world
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import write_atomically
from megatron_chatflow.simulate.device import GPUS
from megatron_chatflow.simulate.inputs import prepare
from megatron_chatflow.simulate.observer import (
    GroupMessages,
    HeldMemory,
    LineCount,
    Observation,
)
from megatron_chatflow.simulate.report import Simulation, describe, merge_equal, to_json
from megatron_chatflow.simulate.shim import library_path
from megatron_chatflow.simulate.worker import Failure, Request

_SECONDS_BETWEEN_LOOKS = 0.1


def rank_classes(config: RunConfig, world_size: int, choice: str) -> dict[int, tuple[int, ...]]:
    """Returns the ranks to simulate, each with the ranks that do the same.

    Args:
        config: Configuration of the run.
        world_size: Number of ranks of the job.
        choice: A rank; ``stages`` for the first rank of every pipeline stage; or ``all-distinct``
            for every rank that may differ from the others: of each stage every context-parallel
            rank, and the first and last data-parallel rank, whose shard of the optimizer is padded.
            Tensor-parallel ranks do the same, and data-parallel ranks between the first and the
            last what the first one does, but for the number of small kernels that copy their
            shards.

    Raises:
        UserError: The choice is none of these.
    """
    if choice.isdecimal() and int(choice) < world_size:
        return {int(choice): (int(choice),)}
    parallel = config.parallel
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    in_stage = world_size // parallel.pipeline_model_parallel_size
    if choice == "stages":
        return {rank: (rank,) for rank in range(0, world_size, in_stage)}
    if choice == "all-distinct":
        # megatron-core numbers tensor-parallel ranks first, then context, data and pipeline.
        last = in_stage // (tensor * context) - 1
        classes: dict[int, list[int]] = {}
        for rank in range(world_size):
            stage, place = divmod(rank, in_stage)
            data, rest = divmod(place, tensor * context)
            data = last if data == last else 0
            first = stage * in_stage + tensor * (rest // tensor + context * data)
            classes.setdefault(first, []).append(rank)
        return {first: tuple(ranks) for first, ranks in sorted(classes.items())}
    raise UserError(
        f"--rank: {choice!r} is neither stages nor all-distinct nor a rank below {world_size}"
    )


def simulate(
    config: RunConfig,
    *,
    gpu: str,
    world_size: int | None,
    ranks: str = "stages",
    output: Path | None = None,
) -> str:
    """Simulates ranks of a run and describes what they did.

    Args:
        config: Configuration of the run.
        gpu: Name of the GPU, one of `device.GPUS`.
        world_size: Number of ranks of the job; None for the minimum of the layout.
        ranks: See `rank_classes`.
        output: File that receives the report as JSON; None for none.

    Returns:
        The description to print.

    Raises:
        UserError: The run would fail on the GPU, or the simulation cannot run here.
    """
    if gpu not in GPUS:
        raise UserError(f"--gpu: {gpu!r} is not known; use one of {', '.join(GPUS)}")
    num_ranks = world_size or config.model_parallel_size
    validate_for_world(config, num_ranks)
    classes = rank_classes(config, num_ranks, ranks)
    library = library_path()  # without a compiler, nothing else is worth starting
    with tempfile.TemporaryDirectory(prefix="chatflow_simulation_") as name:
        folder = Path(name)
        inputs = prepare(config, num_ranks, folder)
        path = folder / "run.yaml"
        path.write_text(inputs.config.to_yaml(), encoding="utf-8")
        observations = run_ranks(library, Request(str(path), gpu, num_ranks, tuple(classes), name))
    rows = merge_equal(list(zip(observations, classes.values(), strict=True)))
    simulation = Simulation(config, gpu, num_ranks, inputs, *zip(*rows, strict=True))
    if output is not None:
        write_atomically(output, json.dumps(to_json(simulation), indent=1) + "\n")
    return describe(simulation)


def run_ranks(library: Path, request: Request) -> list[Observation]:
    """Runs the worker and reads what it observed on every rank.

    Raises:
        UserError: A rank failed.
    """
    folder = Path(request.folder)
    file = folder / "request.json"
    file.write_text(json.dumps(asdict(request)), encoding="utf-8")
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    log = folder / "worker.log"
    # Processes that torch starts inherit the worker's output and may outlive it. A pipe would only
    # end with the last of them.
    with log.open("w", encoding="utf-8") as output:
        worker = subprocess.Popen(
            [sys.executable, "-m", "megatron_chatflow.simulate.worker", str(library), str(file)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    with worker, tqdm(total=len(request.ranks), desc="simulate", unit="rank", disable=None) as bar:
        while worker.poll() is None:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            bar.update(len(list(folder.glob("rank_*.json"))) - bar.n)
    return read_observations(request, log)


def read_observations(request: Request, worker_log: Path) -> list[Observation]:
    """Reads what the worker observed on every rank of a request.

    Args:
        request: The request.
        worker_log: What the worker wrote.

    Raises:
        UserError: A rank failed, or none was started.
    """
    folder = Path(request.folder)
    observations = []
    for rank in request.ranks:
        result, log = folder / f"rank_{rank}.json", folder / f"rank_{rank}.log"
        content = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
        if "observation" in content:
            observations.append(observation_of(content["observation"]))
        elif log.exists():  # ranks after a failure are not started
            failure = Failure(**content["failure"]) if "failure" in content else None
            reason = _reason(failure, log.read_text(encoding="utf-8", errors="replace"))
            raise UserError(f"simulated rank {rank}: {reason}")
    if len(observations) < len(request.ranks):
        reason = _reason(None, worker_log.read_text(encoding="utf-8", errors="replace"))
        raise UserError(f"the simulation did not start: {reason}")
    return observations


def _reason(failure: Failure | None, output: str) -> str:
    """Returns why a simulated rank failed, in one line."""
    if failure is not None and failure.line:
        return f"{failure.line}: {failure.error}; the run would fail here on a GPU"
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line.partition("error: ")[2] for line in lines if line.startswith("error: ")]
    last = errors or lines[-1:] or ["the process ended without a message"]
    return last[0]


def observation_of(values: dict[str, Any]) -> Observation:
    """Reads an observation from JSON."""

    def lines(rows: Sequence[dict[str, Any]]) -> list[LineCount]:
        return [LineCount(**{**row, "lines": tuple(row["lines"])}) for row in rows]

    return Observation(
        **{
            **values,
            "holders": [HeldMemory(**row) for row in values["holders"]],
            "messages": [GroupMessages(**row) for row in values["messages"]],
            "synchronizations": lines(values["synchronizations"]),
            "other_synchronizations": lines(values["other_synchronizations"]),
            "cpu_tensors": lines(values["cpu_tensors"]),
        }
    )
