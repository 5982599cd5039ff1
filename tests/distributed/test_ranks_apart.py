"""Tests ranks that see different files or fail alone: the run is refused with one error message.

Each real process has flags of its own, as nodes with separate disks would.
"""

import json
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import jobs
import pytest
from fork_server import launcher_environment
from tiny_run import TinyRun, write_dataset

PER_RANK = Path(__file__).with_name("per_rank_worker.py")
FAULTY = Path(__file__).with_name("faulty_worker.py")
LATEST = "latest_checkpointed_iteration.txt"
FLAGS = ["--train-iters", 7, "--lr-decay-iters", 8, "--eval-interval", "none", "--no-tensorboard"]


@pytest.fixture(scope="module")
def saved(tiny_run: TinyRun) -> Path:
    """Returns a run's folder with the checkpoints of iterations 2 and 4."""
    folder = tiny_run.folder / "apart"
    flags = ["--config", tiny_run.config, *FLAGS, "--save-interval", 2, "--exit-interval", 4]
    jobs.run(jobs.pretrain(*flags, "--save", folder))
    return folder


def _lines(output: str) -> list[str]:
    """Returns the lines in which ranks report why they end. Fails if there is a traceback."""
    assert 'pretrain.py", line' not in output, output[-6000:]
    return [line for line in output.splitlines() if line.startswith("error: ")]


def _apart(tiny_run: TinyRun, per_rank: Sequence[Sequence[object]], *flags: object) -> list[object]:
    own = json.dumps([[str(flag) for flag in flags] for flags in per_rank])
    launcher = [*jobs.forking_torchrun(len(per_rank)), PER_RANK, own, "--config", tiny_run.config]
    return [*launcher, *FLAGS, *flags]


def _refused(command: Sequence[object]) -> str:
    """Runs a job that must be refused, and returns its only error line."""
    (line,) = _lines(jobs.run(command, expect=1))
    return line


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_sees_an_older_latest_goes_on_from_rank_0s(
    tiny_run: TinyRun, tmp_path: Path, saved: Path
) -> None:
    behind = shutil.copytree(saved, tmp_path / "behind")
    (behind / LATEST).write_text("2\n")
    losses = {}
    for other in (saved, behind):
        save = tmp_path / f"from_{other.name}"
        jobs.run(_apart(tiny_run, [["--load", saved], ["--load", other]], "--save", save))
        losses[other] = [entry["lm_loss"] for entry in jobs.read_metrics(save)[0]]
    assert len(losses[saved]) == 3
    assert losses[behind] == losses[saved]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_without_the_checkpoint_is_named(
    tiny_run: TinyRun, tmp_path: Path, saved: Path
) -> None:
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    line = _refused(_apart(tiny_run, [["--load", saved], ["--load", empty]]))
    assert f"rank 0 starts from {saved}/iter_0000004; rank 1 found no {empty}/iter_0000004" in line
    assert "copy the whole checkpoint to each node" in line
    line = _refused(_apart(tiny_run, [["--load", empty], ["--load", saved]]))
    assert f"would start from scratch; rank 1 found {saved}/iter_0000004" in line

    shutil.copytree(saved, other)
    shutil.rmtree(other / "iter_0000004")
    shutil.copytree(other / "iter_0000002", other / "iter_0000004")
    line = _refused(_apart(tiny_run, [["--load", saved], ["--load", other]]))
    assert f"rank 1 found a different checkpoint at {other}/iter_0000004" in line
    (other / "iter_0000004" / "__0_0.distcp").unlink()
    line = _refused(_apart(tiny_run, [["--load", saved], ["--load", other]]))
    assert "rank 1 could not read it" in line and "__0_0.distcp: is missing" in line


@pytest.mark.distributed
def test_data_that_one_rank_lacks_is_named_once(tiny_run: TinyRun, tmp_path: Path) -> None:
    text = tiny_run.config.read_text(encoding="utf-8")
    lacking = tmp_path / "lacking.yaml"
    lacking.write_text(text.replace("first_text_document", "nowhere_text_document"))
    output = jobs.run(_apart(tiny_run, [[], ["--config", lacking]]), expect=1)
    mine, other = sorted(_lines(output), reverse=True)
    assert mine.startswith("error: rank 1: data.sources.first.paths[0]")
    assert other == "error: rank 0: exiting because rank 1 failed; see its error"
    assert output.count("nowhere_text_document") == 1

    write_dataset(
        tmp_path / "first_text_document", tiny_run.tokenizer_model, seed=9, num_documents=400
    )
    another = tmp_path / "another.yaml"
    path = tiny_run.folder / "first_text_document"
    another.write_text(text.replace(str(path), str(tmp_path / path.name)))
    line = _refused(_apart(tiny_run, [[], ["--config", another]]))
    assert line.startswith("error: data.sources.first: differs between rank 1 and rank 0")


@pytest.mark.distributed
def test_what_all_ranks_meet_is_said_once(tiny_run: TinyRun) -> None:
    line = _refused(_apart(tiny_run, [[], []], "--tensor-model-parallel-size", 3))
    assert "parallel" in line


def _two_processes(tiny_run: TinyRun, fault: object) -> list[tuple[int, str]]:
    """Returns exit status and output of two ranks that no launcher terminates."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [*jobs.FORKED, FAULTY, json.dumps(fault), "--config", tiny_run.config, *FLAGS]
    environment = {**jobs.environment(), **launcher_environment(), **job}
    processes = [
        subprocess.Popen(
            list(map(str, command)),
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, outputs, strict=True)]


@pytest.mark.distributed
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_mistake_in_mid_run_is_said_by_the_rank_that_meets_it(
    tiny_run: TinyRun, culprit: int
) -> None:
    results = _two_processes(tiny_run, {"mistake": {"rank": culprit, "iteration": 3}})
    other = 1 - culprit
    said = [(status, _lines(output)) for status, output in results]
    assert said[culprit] == (2, [f"error: rank {culprit}: data.sources.first: made up"])
    status, (line,) = said[other]
    assert status == 2
    # Without a launcher rank 0 hosts the store for these reports and may have ended with it.
    follows = [f"exiting because rank {culprit} failed", "exiting because its peers are gone"]
    assert line.startswith(tuple(f"error: rank {other}: {text}" for text in follows[: 2 - culprit]))


@pytest.mark.distributed
def test_a_killed_peer_costs_a_line(tiny_run: TinyRun) -> None:
    (status, output), (killed, _) = _two_processes(tiny_run, {"kill": {"rank": 1, "iteration": 3}})
    (line,) = _lines(output)
    assert (status, killed) == (2, -9)
    assert line.startswith("error: rank 0: exiting because its peers are gone")
