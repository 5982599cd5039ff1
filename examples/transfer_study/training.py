"""Trains the foundations and the runs of the study.

Workers are processes of one rank each, one per core (or one per GPU), which train runs one after
another without starting anew. On two cores this is faster than two data-parallel ranks, because
nothing has to be exchanged.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from statistics import fmean
from typing import Any, TextIO

from examples.steps import ROOT, announce, run_tool
from examples.transfer_study.prepare import (
    SMOLLM2,
    WORK,
    digest_of_files,
    fetch_smollm2,
    prepare_text,
    prepare_tokens,
)
from examples.transfer_study.results import Results
from examples.transfer_study.study import (
    REFERENCE,
    SEQ_LENGTH,
    ModelSize,
    Run,
    Study,
    evaluation_config,
    foundation_config,
    make_config,
    reference_runs,
    run_budget,
    training_digest,
)
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import write_output_file

NUM_FOUNDATION_THREADS = 2
"""Threads that train a foundation on CPUs; their number affects the order of sums."""
MAX_FOUNDATION_DIFFERENCE = 0.01
"""Bits per byte of English by which a foundation that is built again may differ."""


@dataclass(frozen=True)
class Prepared:
    """What the runs of a model start from.

    Attributes:
        evaluation: Digest of held-out text and probes.
        weights: Hash of the values of the foundation's weights.
        checkpoint: The foundation's checkpoint.
    """

    evaluation: str
    weights: str
    checkpoint: Path


@dataclass
class Clock:
    """Estimates durations from what was measured, and keeps a time limit.

    Attributes:
        limit_seconds: Seconds from now; None for no limit.
    """

    limit_seconds: float | None = None
    _begin: float = field(default_factory=time.monotonic)
    _measured: dict[str, list[float]] = field(default_factory=dict)

    def add(self, model: str, tokens: float, seconds: float) -> None:
        """Records a run of this session."""
        self._measured.setdefault(model, []).append(seconds / tokens)

    def estimate(self, run: Run, study: Study, results: Results) -> float:
        """Returns the seconds of a run in one worker, with its evaluations."""
        model = study.model(run.model)
        before = [
            one["seconds"] / one["tokens"]
            for one in results.entries.values()
            if one["model"] == run.model and not one["arm"].startswith("random_")
        ]
        measured = self._measured.get(run.model) or before
        rate = fmean(measured) if measured else 1.2 / model.tokens_per_second
        return rate * run_budget(run, model).num_samples * SEQ_LENGTH

    def has_time_for(self, seconds: float) -> bool:
        """Returns whether something that takes so long would end before the limit."""
        if self.limit_seconds is None:
            return True
        return time.monotonic() - self._begin + 1.1 * seconds < self.limit_seconds


class OutOfTimeError(Exception):
    """A run was not started because of the time limit."""


@dataclass
class _Worker:
    process: subprocess.Popen[str]
    answers: TextIO


class Workers:
    """A pool of processes that train runs, one at a time each.

    A worker that fails or is killed is replaced for the next run.
    """

    def __init__(self, num_workers: int, num_threads: int) -> None:
        self.num_workers, self._num_threads = num_workers, num_threads
        self._idle: SimpleQueue[tuple[int, _Worker | None]] = SimpleQueue()
        for number in range(num_workers):
            self._idle.put((number, None))

    def train(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Trains a run in an idle worker and returns the worker's answer.

        Raises:
            UserError: The run fails.
        """
        number, worker = self._idle.get()
        try:
            if worker is None or worker.process.poll() is not None:
                worker = self._start(number)
            assert worker.process.stdin is not None
            try:
                worker.process.stdin.write(json.dumps(job) + "\n")
                worker.process.stdin.flush()
                answer = worker.answers.readline()
            except BrokenPipeError:
                answer = ""
            try:
                result: dict[str, Any] = json.loads(answer)
            except ValueError:
                worker.process.kill()
                worker.process.wait()
                raise UserError(
                    f"{job['folder']}: the training failed, see {job['log']}; run the study again "
                    "to resume it"
                ) from None
            if "error" in result:
                raise UserError(result["error"])
            return result
        finally:
            self._idle.put((number, worker))

    def close(self) -> None:
        """Ends the workers."""
        for _ in range(self.num_workers):
            _, worker = self._idle.get()
            if worker is not None and worker.process.stdin is not None:
                worker.process.stdin.close()
                worker.process.wait()
                worker.answers.close()

    def _start(self, number: int) -> _Worker:
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._num_threads)}
        if num_gpus():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            devices = visible.split(",") if visible else [str(k) for k in range(num_gpus())]
            environment["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
        # Answers have a pipe of their own, because libraries print to standard output.
        read_end, write_end = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-m", "examples.transfer_study.worker", str(write_end)],
            stdin=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
            pass_fds=(write_end,),
        )
        os.close(write_end)
        return _Worker(process, os.fdopen(read_end, encoding="utf-8"))


def num_gpus() -> int:
    """Returns the number of visible GPUs."""
    import torch

    return torch.cuda.device_count()


def default_workers() -> int:
    """Returns the number of GPUs, or of cores without a GPU."""
    return num_gpus() or len(os.sched_getaffinity(0))


def prepare(model: ModelSize, study: Study, results: Results, clock: Clock) -> Prepared:
    """Prepares tokens and the foundation of a model; what is present is kept.

    Raises:
        UserError: A step fails.
        OutOfTimeError: There is no time for the foundation and a run after it.
    """
    overlaps = prepare_text()
    if model.name == "smollm2":
        fetch_smollm2()
    prepare_tokens(model.tokens, model.tokenizer)
    corpus = digest_of_files(model.tokens.files())
    config = foundation_config(model)
    made_of = training_digest(config, corpus, "")
    sizes = model.tokens.held_out_sizes()
    evaluation = model.evaluation_digest()
    facts = {
        "corpus": corpus,
        "evaluation": evaluation,
        "foundation": made_of,
        "training_tokens": model.tokens.training_tokens(),
        "held_out": {name: {**sizes[name], **overlaps[name]} for name in sizes},
    }
    if results.models.get(model.name) != facts:
        results.models[model.name] = facts
        results.write()
    folder = study.folder / "foundations" / model.name
    record = folder / "foundation.json"
    wanted = {"foundation": made_of, "evaluation": evaluation}
    found = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    if found.get("made_of") != wanted:
        tokens = (model.foundation_iterations + model.budget.iterations) * SEQ_LENGTH
        tokens *= model.budget.samples_per_iteration
        if not clock.has_time_for(tokens / model.tokens_per_second):
            raise OutOfTimeError
        announce(f"the English foundation of {model.name}")
        found = {"made_of": wanted, **train_foundation(model, folder, config, made_of)}
        write_output_file(record, json.dumps(found, indent=1) + "\n")
    known = results.foundations.setdefault(model.name, {})
    weights = found["weights"]
    for other in known.values():
        difference = abs(found["final"]["english"] - other["final"]["english"])
        if other["made_of"] == wanted and difference > MAX_FOUNDATION_DIFFERENCE:
            print(
                f"warning: {model.name}: this foundation differs from the recorded one by "
                f"{difference:.3f} bits per byte of English; its runs are not compared with others",
                flush=True,
            )
    if weights not in known:
        known[weights] = found
        results.write()
    return Prepared(evaluation, weights, folder / "run")


def train_foundation(
    model: ModelSize, folder: Path, config: dict[str, Any], made_of: str
) -> dict[str, Any]:
    """Trains the foundation and returns its curve, its measures and the hash of its weights."""
    start: dict[str, Any] = {"from_scratch": True}
    if model.name == "smollm2":
        imported = WORK / "smollm2_imported"
        if not (imported / "latest_checkpointed_iteration.txt").exists():
            run_tool("convert_checkpoint.py", "import", "--hf", SMOLLM2, "--output", imported)
        start = {"pretrained_checkpoint": str(imported)}
    workers = Workers(1, 1 if num_gpus() else NUM_FOUNDATION_THREADS)
    try:
        return workers.train(make_job(folder, made_of, config, start, evaluation_config(model)))
    finally:
        workers.close()


def make_job(
    folder: Path,
    digest: str,
    config: Mapping[str, Any],
    start: Mapping[str, Any],
    evaluation: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the message for a worker, and empties a folder that belongs to another digest.

    Args:
        folder: The folder of the run, which may hold checkpoints to continue from.
        digest: Digest of what determines the run.
        config: The configuration without ``checkpoint``.
        start: Further keys of ``checkpoint``: the initial weights.
        evaluation: The configuration of the evaluation after it, without ``checkpoint``.
    """
    mark = folder / "digest.txt"
    if folder.exists() and not (mark.exists() and mark.read_text(encoding="utf-8") == digest):
        shutil.rmtree(folder)
    write_output_file(mark, digest)
    run = str(folder / "run")
    interval = max(1, config["train"]["train_iters"] // 4)
    checkpoint = {"save": run, "load": run, "save_interval": interval, "save_retain": 1, **start}
    after = {"save": str(folder / "evaluation"), "pretrained_checkpoint": run}
    return {
        "folder": str(folder),
        "log": str(folder / "log.txt"),
        "config": {**config, "checkpoint": checkpoint},
        "evaluation": {**evaluation, "checkpoint": after},
    }


def delete_checkpoints(folder: Path) -> None:
    """Deletes the weights of a run whose result has been written."""
    (folder / "run/latest_checkpointed_iteration.txt").unlink(missing_ok=True)
    for checkpoint in (folder / "run").glob("iter_*"):
        shutil.rmtree(checkpoint)


def missing_runs(
    runs: Iterable[Run], study: Study, results: Results, weights: str | None = None
) -> list[Run]:
    """Returns the runs without a current result, and the static runs that they are compared with.

    Args:
        runs: Runs in their order.
        study: The sizes.
        results: The results.
        weights: Hash of the foundation that is present. A seed that was begun with another one
            needs a static run from this one.
    """
    missing: dict[Run, None] = {}
    for run in runs:
        if results.of_run(run, study):
            delete_checkpoints(study.folder / run.key)
            continue
        statics = reference_runs(run)
        is_paired = not run.arm.startswith("random_") and run.arm != REFERENCE
        if weights is not None and is_paired and not missing.keys() & set(statics):
            entries = [entry for one in statics for entry in results.of_run(one, study)]
            if entries and all(entry["foundation"] != weights for entry in entries):
                used = next(one for one in statics if results.of_run(one, study))
                missing[used] = None
        missing[run] = None
    return list(missing)


def train_all(
    runs: Sequence[Run],
    study: Study,
    prepared: Prepared,
    results: Results,
    workers: Workers,
    clock: Clock,
) -> list[str]:
    """Trains runs, writes each result when it is there, and returns the errors of failed runs.

    Runs of which the clock says that they would not finish are not started.
    """
    failures: list[str] = []
    lock = threading.Lock()  # of results, which the estimate reads

    def train_one(run: Run) -> dict[str, Any]:
        with lock:
            seconds = clock.estimate(run, study, results)
        if not clock.has_time_for(seconds):
            raise OutOfTimeError
        config = make_config(run, study, results.proposals)
        digest = results.digest(run, study)
        assert digest is not None
        start = {"pretrained_checkpoint": str(prepared.checkpoint)}
        # Checkpoints of another foundation are not continued from.
        job = make_job(
            study.folder / run.key,
            f"{digest} {prepared.weights}",
            config,
            start,
            evaluation_config(study.model(run.model)),
        )
        begin = time.monotonic()
        result = workers.train(job)
        clock.add(run.model, result["tokens"], time.monotonic() - begin)
        return {
            **vars(run),
            "digest": digest,
            "evaluation": prepared.evaluation,
            "foundation": prepared.weights,
            "schedule": config["data"]["schedule"],
            **{name: value for name, value in result.items() if name != "weights"},
        }

    pool = ThreadPoolExecutor(workers.num_workers)
    try:
        futures = {pool.submit(train_one, run): run for run in runs}
        begin, num_done, num_skipped = time.monotonic(), 0, 0
        for future in as_completed(futures):
            run = futures[future]
            try:
                entry = future.result()
            except OutOfTimeError:
                num_skipped += 1
                continue
            except UserError as error:
                failures.append(f"{run.key}: {error}")
                print(failures[-1], flush=True)
                continue
            with lock:
                results.add(run, entry)
            delete_checkpoints(study.folder / run.key)
            num_done += 1
            left = (time.monotonic() - begin) / num_done * (len(runs) - num_done) / 60
            shown = ", ".join(f"{name} {value:.3f}" for name, value in entry["final"].items())
            print(f"{run.key}: {shown}; {left:.0f} minutes left in this part", flush=True)
        if num_skipped:
            print(f"time limit: {num_skipped} runs were not started", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C also reaches the workers, which save and stop
    return failures
