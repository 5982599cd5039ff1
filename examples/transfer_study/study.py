"""The runs of the study: what they are, what determines them, and in which order they are trained.

A `Run` is a model, an arm, the shape of its learning rate and a seed. Its result is one entry of
``results.json``, with a digest of everything that determines it: the configuration, the tokens and
the weights of the foundation. Runs whose entry has the same digest are not trained again.

Workers are processes of one rank each, one per core (or one per GPU), which train runs one after
another without starting anew. On two cores this is faster than two data-parallel ranks, because
nothing has to be exchanged.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import yaml

from examples.steps import ROOT, announce, run_tool
from examples.transfer_study.arms import (
    ARMS,
    DESCRIPTION,
    Budget,
    make_schedule,
    random_schedule,
)
from examples.transfer_study.prepare import (
    SMOLLM2,
    TRAINING,
    WORK,
    Tokens,
    digest_of,
    digest_of_files,
    fetch_smollm2,
    prepare_corpora,
    prepare_tokens,
)
from megatron_chatflow.config import load_config
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import write_output_file

HERE = Path("examples/transfer_study")
LEARNING_RATES: tuple[str, ...] = tuple(DESCRIPTION["learning_rates"])
PROPOSED = "proposed"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ModelSize:
    """The size of a model's part of the study.

    Attributes:
        name: The recipe, ``<name>.yaml``.
        budget: The length of an arm.
        foundation_iterations: Length of the English foundation, with the batch of an arm.
        seeds: Seeds of the data, in the order in which they are trained.
        learning_rates: Shapes of the learning rate, of `LEARNING_RATES`.
        tails: Whether arms have a common tail.
        arms: The arms.
        num_random: Number of random schedules.
        num_evaluations: Number of evaluations during a run, without that before it.
        held_out_bytes: Approximate bytes of held-out text of each source.
        tokens_per_second: Of one core, for the first estimate of the time.
    """

    name: str
    budget: Budget
    foundation_iterations: int
    seeds: tuple[int, ...]
    learning_rates: tuple[str, ...]
    tails: tuple[bool, ...]
    arms: tuple[str, ...]
    num_random: int
    num_evaluations: int
    held_out_bytes: int
    tokens_per_second: float

    @property
    def tokens(self) -> Tokens:
        """The model's indexed datasets."""
        return Tokens(WORK / self.name, self.held_out_bytes)

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's file or folder."""
        return SMOLLM2 if self.name == "smollm2" else TRAINING / "tokenizer.model"


@dataclass(frozen=True)
class Study:
    """All sizes of the study.

    Attributes:
        folder: Where runs are trained.
        models: The models, in the order in which they are trained.
        probes: Values of ``train.eval_probes``, evaluated before and after every run.
    """

    folder: Path
    models: tuple[ModelSize, ...]
    probes: tuple[str, ...]

    def model(self, name: str) -> ModelSize:
        """Returns the size of a model."""
        return next(model for model in self.models if model.name == name)


PROBES: tuple[str, ...] = ()
_SMALL = ModelSize(
    name="small",
    budget=Budget(iterations=192, samples_per_iteration=8),
    foundation_iterations=600,
    seeds=(1, 2, 3),
    learning_rates=("wsd", "cosine"),
    tails=(False, True),
    arms=ARMS,
    num_random=DESCRIPTION["random"]["num_schedules"],
    num_evaluations=6,
    held_out_bytes=24_000,
    tokens_per_second=1800,
)
_SMOLLM2 = ModelSize(
    name="smollm2",
    budget=Budget(iterations=120, samples_per_iteration=8),
    foundation_iterations=120,
    seeds=(1, 2),
    learning_rates=("wsd",),
    tails=(False, True),
    arms=ARMS,
    num_random=0,
    num_evaluations=4,
    held_out_bytes=24_000,
    tokens_per_second=325,
)
FULL = Study(Path("runs/transfer_study"), (_SMALL, _SMOLLM2), PROBES)
QUICK = Study(
    Path("runs/transfer_study_quick"),
    (
        replace(
            _SMALL,
            budget=Budget(iterations=40, samples_per_iteration=8),
            foundation_iterations=60,
            seeds=(1, 2),
            learning_rates=("wsd",),
            tails=(False,),
            arms=("dynamic", "static", "reversed", "two_stage"),
            num_random=0,
            num_evaluations=4,
        ),
    ),
    PROBES,
)


@dataclass(frozen=True)
class Run:
    """One run of the study.

    Attributes:
        model: The name of the model's size.
        arm: An arm of `ARMS`, ``random_<number>`` or `PROPOSED`.
        learning_rate: The shape of the learning rate.
        has_tail: Whether the last part has the common mixture.
        seed: The seed of the data.
    """

    model: str
    arm: str
    learning_rate: str
    has_tail: bool
    seed: int

    @property
    def key(self) -> str:
        """The name of its entry in ``results.json`` and of its folder."""
        tail = "tail" if self.has_tail else "no_tail"
        return f"{self.model}/{self.learning_rate}/{tail}/{self.arm}/seed_{self.seed}"


def plan(study: Study) -> list[Run]:
    """Returns all runs except the proposed schedules, in an order that makes parts useful.

    For each model, all arms of a seed follow each other, first with the first learning rate for all
    seeds and then with the next. Random schedules come last.
    """
    runs = [
        Run(model.name, arm, learning_rate, has_tail, seed)
        for model in study.models
        for learning_rate in model.learning_rates
        for seed in model.seeds
        for has_tail in model.tails
        for arm in model.arms
    ]
    return runs + [
        Run(model.name, f"random_{number}", model.learning_rates[0], False, model.seeds[0])
        for model in study.models
        for number in range(1, model.num_random + 1)
    ]


def proposed_runs(model: ModelSize) -> list[Run]:
    """Returns the runs of the schedule that the fit proposes."""
    if not model.num_random:
        return []
    return [Run(model.name, PROPOSED, model.learning_rates[0], False, s) for s in model.seeds]


def run_budget(run: Run, model: ModelSize) -> Budget:
    """Returns the length of a run; random schedules are shorter than arms."""
    if not run.arm.startswith("random_"):
        return model.budget
    length = Fraction(DESCRIPTION["random"]["length"])
    return replace(model.budget, iterations=round(model.budget.iterations * length))


def make_config(
    run: Run, study: Study, schedule: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the configuration of a run, without folders.

    Args:
        run: The run.
        study: The sizes.
        schedule: The schedule of a proposed run.
    """
    model = study.model(run.model)
    budget = run_budget(run, model)
    if run.arm.startswith("random_"):
        schedule = random_schedule(int(run.arm.removeprefix("random_")), budget)
    elif run.arm != PROPOSED:
        schedule = make_schedule(run.arm, budget, has_tail=run.has_tail)
    assert schedule is not None, "a proposed run has one"
    config = _recipe(model, budget.iterations)
    config["data"] |= {"sources": model.tokens.sources(), "schedule": dict(schedule)}
    config["optimizer"] |= DESCRIPTION["learning_rates"][run.learning_rate]
    if config["optimizer"]["lr_decay_style"] == "WSD":
        config["optimizer"]["lr_wsd_decay_iters"] = budget.tail_iterations
    interval = max(1, budget.iterations // model.num_evaluations)
    config["train"] |= {
        "train_iters": budget.iterations,
        "seed": run.seed,
        "eval_interval": interval,
        "eval_iters": 1000,  # all held-out text
    }
    if study.probes:
        config["train"] |= {
            "eval_probes": list(study.probes),
            "probe_interval": budget.iterations,
        }
    return config


def foundation_config(model: ModelSize) -> dict[str, Any]:
    """Returns the configuration of a model's foundation, which is trained on English alone."""
    config = _recipe(model, model.foundation_iterations)
    config["data"] |= {
        "sources": model.tokens.sources(),
        "schedule": {"knots": [{"at": 0, "weights": {"english": 1}}]},
    }
    config["optimizer"]["lr_decay_style"] = "cosine"
    config["train"] |= {
        "train_iters": model.foundation_iterations,
        "eval_interval": max(1, model.foundation_iterations // 6),
        "eval_iters": 1000,
    }
    if model.name == "small":
        config["optimizer"] |= {"lr": 3e-3, "min_lr": 3e-4}
    return config


def _recipe(model: ModelSize, iterations: int) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((HERE / f"{model.name}.yaml").read_text("utf-8"))
    config["train"]["global_batch_size"] = model.budget.samples_per_iteration
    # A short run does not consist of its warmup.
    warmup = min(config["optimizer"]["lr_warmup_iters"], iterations // 8)
    config["optimizer"]["lr_warmup_iters"] = warmup
    return config


class Results:
    """The results of a study, ``results.json``. Every change is written at once, atomically.

    Attributes:
        path: The file.
        entries: Results by `Run.key`.
        foundations: What is known of the foundations, by model.
        proposals: Proposed schedules with their predictions, by model.
    """

    def __init__(self, path: Path) -> None:
        """Reads the file if it exists.

        Raises:
            UserError: It is damaged or of another format.
        """
        self.path = path
        self.entries: dict[str, Any] = {}
        self.foundations: dict[str, Any] = {}
        self.proposals: dict[str, Any] = {}
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["format_version"]
            self.entries, self.foundations = content["runs"], content["foundations"]
            self.proposals = content["proposals"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not the results of a study ({error}); delete it or give another --results"
            ) from error
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path}: has format {version}, not {FORMAT_VERSION}; give another --results"
            )

    def write(self) -> None:
        """Writes the file."""
        content = {
            "format_version": FORMAT_VERSION,
            "foundations": self.foundations,
            "proposals": self.proposals,
            "runs": {key: self.entries[key] for key in sorted(self.entries)},
        }
        write_output_file(self.path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def has(self, run: Run, digest: str) -> bool:
        """Returns whether a run is complete and was determined by the same things."""
        return self.entries.get(run.key, {}).get("digest") == digest


@dataclass(frozen=True)
class Prepared:
    """What the runs of a model start from.

    Attributes:
        corpus: Digest of all tokens.
        foundation: Digest of the foundation's weights.
        checkpoint: The foundation's checkpoint.
    """

    corpus: str
    foundation: str
    checkpoint: Path

    def digest(self, config: Mapping[str, Any]) -> str:
        """Returns a digest of everything that determines the result of a run."""
        return digest_of({"config": config, "corpus": self.corpus, "foundation": self.foundation})


class Workers:
    """A pool of processes that train runs, one at a time each.

    A worker that fails or is killed is replaced for the next run.
    """

    def __init__(self, num_workers: int, num_threads: int) -> None:
        self.num_workers, self._num_threads = num_workers, num_threads
        self._idle: SimpleQueue[tuple[int, subprocess.Popen[str] | None]] = SimpleQueue()
        for number in range(num_workers):
            self._idle.put((number, None))

    def train(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Trains a run in an idle worker and returns the worker's answer.

        Raises:
            UserError: The run fails.
        """
        number, process = self._idle.get()
        try:
            if process is None or process.poll() is not None:
                process = self._start(number)
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            if not answer:
                process.wait()
                raise UserError(
                    f"{job['folder']}: the training failed, see {job['log']}; run the study again "
                    "to resume it"
                )
            result: dict[str, Any] = json.loads(answer)
            if "error" in result:
                raise UserError(result["error"])
            return result
        finally:
            self._idle.put((number, process))

    def close(self) -> None:
        """Ends the workers."""
        for _ in range(self.num_workers):
            _, process = self._idle.get()
            if process is not None and process.stdin is not None:
                process.stdin.close()
                process.wait()

    def _start(self, number: int) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._num_threads)}
        if num_gpus():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            devices = visible.split(",") if visible else [str(k) for k in range(num_gpus())]
            environment["CUDA_VISIBLE_DEVICES"] = devices[number]
        return subprocess.Popen(
            [sys.executable, "-m", "examples.transfer_study.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )


def num_gpus() -> int:
    """Returns the number of visible GPUs."""
    import torch

    return torch.cuda.device_count()


def default_workers() -> int:
    """Returns the number of GPUs, or of cores without a GPU."""
    return num_gpus() or len(os.sched_getaffinity(0))


def prepare(model: ModelSize, study: Study, results: Results) -> Prepared:
    """Prepares tokens and the foundation of a model; what is present is kept.

    Raises:
        UserError: A step fails.
    """
    prepare_corpora()
    if model.name == "smollm2":
        fetch_smollm2()
    prepare_tokens(model.tokens, model.tokenizer)
    corpus = model.tokens.digest()
    folder = study.folder / "foundations" / model.name
    config = foundation_config(model)
    wanted = digest_of({"config": config, "corpus": corpus})
    record = folder / "foundation.json"
    facts = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    if facts.get("made_of") != wanted:
        announce(f"the English foundation of {model.name}")
        facts = {"made_of": wanted} | train_foundation(model, folder, config, wanted)
        write_output_file(record, json.dumps(facts, indent=1) + "\n")
    if results.foundations.get(model.name) != facts:
        results.foundations[model.name] = facts
        results.write()
    return Prepared(corpus, facts["digest"], folder / "run")


def train_foundation(
    model: ModelSize, folder: Path, config: dict[str, Any], made_of: str
) -> dict[str, Any]:
    """Trains the foundation with all cores and returns its curve and the digest of its weights."""
    start: dict[str, Any] = {"from_scratch": True}
    if model.name == "smollm2":
        imported = WORK / "smollm2_imported"
        if not (imported / "latest_checkpointed_iteration.txt").exists():
            run_tool("convert_checkpoint.py", "import", "--hf", SMOLLM2, "--output", imported)
        start = {"pretrained_checkpoint": str(imported)}
    workers = Workers(1, 1 if num_gpus() else default_workers())
    try:
        result = workers.train(make_job(folder, made_of, config, start))
    finally:
        workers.close()
    latest = int((folder / "run/latest_checkpointed_iteration.txt").read_text(encoding="utf-8"))
    weights = folder / "run" / f"iter_{latest:07d}"
    files = sorted(path for path in weights.rglob("*") if path.is_file())
    return {"digest": digest_of_files(files), **result}


def make_job(
    folder: Path,
    digest: str,
    config: Mapping[str, Any],
    start: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the message for a worker, and empties a folder that belongs to another digest.

    Args:
        folder: The folder of the run, which may hold checkpoints to continue from.
        digest: Digest of what determines the run.
        config: The configuration without ``checkpoint``.
        start: Further keys of ``checkpoint``: the initial weights.
    """
    mark = folder / "digest.txt"
    if folder.exists() and not (mark.exists() and mark.read_text(encoding="utf-8") == digest):
        shutil.rmtree(folder)
    write_output_file(mark, digest)
    run = str(folder / "run")
    interval = max(1, config["train"]["train_iters"] // 4)
    checkpoint = {"save": run, "load": run, "save_interval": interval, "save_retain": 1, **start}
    return {
        "folder": str(folder),
        "log": str(folder / "log.txt"),
        "config": {**config, "checkpoint": checkpoint},
    }


def delete_checkpoints(folder: Path) -> None:
    """Deletes the weights of a run whose result has been written."""
    (folder / "run/latest_checkpointed_iteration.txt").unlink(missing_ok=True)
    for checkpoint in (folder / "run").glob("iter_*"):
        shutil.rmtree(checkpoint)


def remaining(
    runs: Iterable[tuple[Run, dict[str, Any]]], prepared: Prepared, results: Results
) -> Iterator[tuple[Run, dict[str, Any], str]]:
    """Yields the runs that have no result with the same digest, with configuration and digest."""
    for run, config in runs:
        digest = prepared.digest(config)
        if results.has(run, digest):
            print(f"{run.key}: done, skipped", flush=True)
        else:
            yield run, config, digest


def train_all(
    runs: Sequence[tuple[Run, dict[str, Any]]],
    study: Study,
    prepared: Prepared,
    results: Results,
    workers: Workers,
) -> None:
    """Trains the runs that are missing, and writes each result when it is there.

    A run that fails does not stop the others.

    Raises:
        UserError: A run failed.
    """
    missing = list(remaining(runs, prepared, results))
    failures = []
    pool = ThreadPoolExecutor(workers.num_workers)
    try:
        futures = {}
        for run, config, digest in missing:
            start = {"pretrained_checkpoint": str(prepared.checkpoint)}
            job = make_job(study.folder / run.key, digest, config, start)
            futures[pool.submit(workers.train, job)] = run, config, digest
        begin = time.monotonic()
        for number, future in enumerate(as_completed(futures), 1):
            run, config, digest = futures[future]
            try:
                result = future.result()
            except UserError as error:
                failures.append(str(error))
                print(f"{run.key}: {error}", flush=True)
                continue
            results.entries[run.key] = {
                **vars(run),
                "digest": digest,
                "corpus": prepared.corpus,
                "foundation": prepared.foundation,
                "schedule": config["data"]["schedule"],
                **result,
            }
            results.write()
            delete_checkpoints(study.folder / run.key)
            left = (time.monotonic() - begin) / number * (len(missing) - number) / 60
            shown = ", ".join(f"{name} {value:.3f}" for name, value in result["final"].items())
            print(f"{run.key}: {shown}; {left:.0f} minutes left in this part", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C also reaches the workers, which save and stop
    if failures:
        raise UserError(f"{len(failures)} of {len(missing)} runs failed; first: {failures[0]}")


def check_config(config: Mapping[str, Any], folder: Path) -> None:
    """Checks a configuration as training would.

    Raises:
        UserError: It is not valid.
    """
    path = folder / "run.yaml"
    write_output_file(path, yaml.safe_dump(dict(config), sort_keys=False))
    load_config(path)
