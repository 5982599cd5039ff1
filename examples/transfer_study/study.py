"""The runs of the study: what they are, what determines them, and in which order they are trained.

A `Run` is a model, an arm, the shape of its learning rate and a seed. Its result is one entry of
``results.json``, with a digest of what determines its weights: the configuration without what
cannot change them, the training tokens, and the configuration of the foundation. Runs whose entry
has the same digest are not trained again, on whatever machine. What evaluates the weights,
held-out text and probes, has a digest of its own.

A foundation that is built again on another machine may have other last bits. Each entry therefore
has a hash of the values of the weights it started from, and only runs with the same hash are
compared.

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
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from queue import SimpleQueue
from statistics import fmean
from typing import Any, TextIO

import yaml

from examples.steps import ROOT, announce, run_tool
from examples.transfer_study.arms import (
    ARMS,
    DESCRIPTION,
    EQUAL_ARMS,
    SOURCES,
    Budget,
    make_schedule,
    random_schedule,
    static_schedule,
)
from examples.transfer_study.prepare import (
    SMOLLM2,
    STUDY_VERSION,
    TRAINING,
    WORK,
    Tokens,
    digest_of,
    digest_of_files,
    fetch_smollm2,
    prepare_text,
    prepare_tokens,
    text_folder,
)
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import write_output_file

HERE = Path("examples/transfer_study")
LEARNING_RATES: tuple[str, ...] = tuple(DESCRIPTION["learning_rates"])
REFERENCE = "static"
PROPOSED = "proposed"
PROPOSED_STATIC = "proposed_static"
"""The proposed schedule, and the static one that draws the same samples of each source."""
SEQ_LENGTH = 512
"""Tokens of a sample, in all recipes."""
FORMAT_VERSION = 2
NUM_FOUNDATION_THREADS = 2
"""Threads that train a foundation on CPUs; their number affects the order of sums."""
MAX_FOUNDATION_DIFFERENCE = 0.01
"""Bits per byte of English by which a foundation that is built again may differ."""

# Keys that cannot change the weights of a run, by section.
_NO_EFFECT: dict[str, set[str]] = {
    "tokenizer": {"tokenizer_model"},  # the tokens are hashed
    "train": {"eval_interval", "eval_iters", "micro_batch_size", "bf16"},
}


@dataclass(frozen=True)
class ModelSize:
    """The size of a model's part of the study.

    Attributes:
        name: The recipe, ``<name>.yaml``.
        budget: The length of an arm.
        foundation_iterations: Length of the English foundation, with the batch of an arm.
        num_random: Number of random schedules.
        num_evaluations: Number of evaluations before the decay of the learning rate, the last of
            which is at its start. There are two more, before and after training.
        held_out_bytes: Approximate bytes of held-out text of each source after training.
        curve_bytes: The same during training.
        probes: Probes, with their files in `text_folder`.
        tokens_per_second: Of one core, for the first estimate of the time.
    """

    name: str
    budget: Budget
    foundation_iterations: int
    num_random: int
    num_evaluations: int
    held_out_bytes: int
    curve_bytes: int
    probes: tuple[str, ...]
    tokens_per_second: float

    @property
    def tokens(self) -> Tokens:
        """The model's indexed datasets."""
        folder = WORK / f"{self.name}_{STUDY_VERSION}"
        return Tokens(folder, self.held_out_bytes, self.curve_bytes)

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's file or folder."""
        return SMOLLM2 if self.name == "smollm2" else TRAINING / "tokenizer.model"

    def probe_settings(self) -> list[str]:
        """Returns the values of ``train.eval_probes``."""
        return [probe.replace(":", f":{text_folder()}/") for probe in self.probes]

    def evaluation_digest(self) -> str:
        """Returns a hash of held-out text and probes."""
        names = [probe.partition(":")[2] for probe in self.probes]
        files = [text_folder() / name for name in names if name]
        held_out = digest_of_files(self.tokens.held_out_files())
        return digest_of([self.probes, digest_of_files(files), held_out])


@dataclass(frozen=True)
class Run:
    """One run of the study.

    Attributes:
        model: The name of the model's size.
        arm: An arm of `ARMS`, ``random_<number>``, `PROPOSED` or `PROPOSED_STATIC`.
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

    @property
    def is_proposed(self) -> bool:
        """Whether its schedule follows from other runs."""
        return self.arm in (PROPOSED, PROPOSED_STATIC)

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "Run":
        """Returns the run of a result."""
        return cls(*(entry[name] for name in ("model", "arm", "learning_rate", "has_tail", "seed")))


@dataclass(frozen=True)
class Stage:
    """Runs that follow each other: for each seed, all arms.

    Attributes:
        model: The model.
        arms: Names of arms; ``/tail`` after a name means with the common tail.
        seeds: Seeds of the data.
        learning_rate: The shape of the learning rate.
    """

    model: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    learning_rate: str = LEARNING_RATES[0]

    def runs(self) -> list[Run]:
        """Returns the runs in their order."""
        return [
            Run(self.model, arm.removesuffix("/tail"), self.learning_rate, "/" in arm, seed)
            for seed in self.seeds
            for arm in self.arms
        ]


@dataclass(frozen=True)
class Study:
    """All sizes of the study.

    Attributes:
        folder: Where runs are trained.
        results: Where results are, unless the command names another file.
        models: The models.
        stages: The runs, in the order in which they are trained.
        is_complete: Whether all other arms follow, with and without tail.
    """

    folder: Path
    results: Path
    models: tuple[ModelSize, ...]
    stages: tuple[Stage, ...]
    is_complete: bool

    def model(self, name: str) -> ModelSize:
        """Returns the size of a model."""
        return next(model for model in self.models if model.name == name)


def _probes(questions: int, shots: int, pairs: int, strings: int) -> tuple[str, ...]:
    """Returns probes whose numbers of texts keep them within 3 % of the compute of a run."""
    fewshot = f"questions={questions},shots={shots},max_bytes=256"
    return (
        f"copy,label=copy,length=48,strings={strings}",
        f"fewshot,label=fewshot_en,{fewshot}:fewshot_en.jsonl",
        f"fewshot,label=fewshot_zh,{fewshot}:fewshot_zh.jsonl",
        f"translation,label=translation,max_bytes=256,pairs={pairs}:translation.jsonl",
        f"pairs,label=pairs,pairs={pairs}:pairs.jsonl",
    )


_SMALL = ModelSize(
    name="small",
    budget=Budget(iterations=180, samples_per_iteration=8),
    foundation_iterations=430,
    num_random=DESCRIPTION["random"]["num_schedules"],
    num_evaluations=3,
    held_out_bytes=70_000,
    curve_bytes=12_000,
    probes=_probes(questions=32, shots=4, pairs=96, strings=32),
    tokens_per_second=1800,
)
_SMOLLM2 = ModelSize(
    name="smollm2",
    budget=Budget(iterations=100, samples_per_iteration=8),
    foundation_iterations=100,
    num_random=0,
    num_evaluations=1,
    held_out_bytes=35_000,
    curve_bytes=6_000,
    # Its tokenizer needs more tokens for Chinese: four examples do not fit.
    probes=_probes(questions=20, shots=2, pairs=40, strings=16),
    tokens_per_second=325,
)
_TAILED = ("static/tail", "dynamic/tail", "reversed/tail")
# The static arm with the tail is also that without: they differ by rounding alone.
_EQUAL = (*_TAILED, "dynamic", "reversed", "two_stage", "two_stage/tail")
FULL = Study(
    Path("runs/transfer_study"),
    HERE / "results.json",
    (_SMALL, _SMOLLM2),
    (
        Stage("small", _EQUAL, (1, 2, 3)),
        Stage("small", _TAILED, (4, 5)),
        Stage("small", ("chinese_only", "chinese_then_instruction"), (1, 2, 3)),
        Stage("small", tuple(f"random_{k}" for k in range(1, _SMALL.num_random + 1)), (1,)),
        Stage("small", (PROPOSED, PROPOSED_STATIC), (1, 2, 3)),
        Stage("small", ("static", "dynamic", "reversed", "two_stage"), (1, 2, 3), "cosine"),
        Stage("smollm2", (*_TAILED, "english_only"), (1,)),
        Stage("smollm2", _TAILED, (2, 3)),
        Stage("small", ("chinese_only/tail", "chinese_then_instruction/tail"), (1,)),
    ),
    is_complete=True,
)
QUICK = Study(
    Path("runs/transfer_study_quick"),
    Path("runs/transfer_study_quick/results.json"),
    (
        replace(
            _SMALL,
            budget=Budget(iterations=40, samples_per_iteration=8),
            foundation_iterations=60,
            num_random=0,
            num_evaluations=2,
            held_out_bytes=12_000,
            probes=_probes(questions=6, shots=4, pairs=12, strings=6),
        ),
    ),
    (Stage("small", ("static", *(arm for arm in EQUAL_ARMS if arm != REFERENCE)), (1, 2)),),
    is_complete=False,
)


def plan(study: Study) -> list[Run]:
    """Returns all runs, in an order that makes parts useful.

    In a complete study, what the stages leave out follows: every arm with and without tail, and the
    cosine for the small model.
    """
    runs = dict.fromkeys(run for stage in study.stages for run in stage.runs())
    if study.is_complete:
        for model in study.models:
            learning_rates = LEARNING_RATES if model.num_random else LEARNING_RATES[:1]
            arms = [arm for arm in ARMS if arm not in (REFERENCE, "english_only")]
            for rate in learning_rates:
                for has_tail in (False, True):
                    more = tuple(f"{arm}/tail" if has_tail else arm for arm in arms)
                    seeds = (1, 2, 3)
                    runs |= dict.fromkeys(Stage(model.name, more, seeds, rate).runs())
    return list(runs)


def reference_runs(run: Run) -> tuple[Run, Run]:
    """Returns the static runs of a seed, that of the same setting first; one of them is enough."""
    static = replace(run, arm=REFERENCE)
    return static, replace(static, has_tail=not run.has_tail)


def run_budget(run: Run, model: ModelSize) -> Budget:
    """Returns the length of a run; random schedules are shorter than arms."""
    if not run.arm.startswith("random_"):
        return model.budget
    length = Fraction(DESCRIPTION["random"]["length"])
    return replace(model.budget, iterations=round(model.budget.iterations * length))


def make_config(
    run: Run, study: Study, proposals: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the configuration of a run, without folders.

    Args:
        run: The run.
        study: The sizes.
        proposals: `Results.proposals`, for proposed runs.
    """
    model = study.model(run.model)
    budget = run_budget(run, model)
    if run.is_proposed:
        assert proposals is not None, "a proposed run follows from others"
        schedule = proposals[model.name]["schedule"]
        if run.arm == PROPOSED_STATIC:
            schedule = static_schedule(schedule, budget)
    elif run.arm.startswith("random_"):
        schedule = random_schedule(int(run.arm.removeprefix("random_")), budget)
    else:
        schedule = make_schedule(run.arm, budget, has_tail=run.has_tail)
    config = _recipe(model, budget.iterations)
    config["data"] |= {"sources": model.tokens.sources(), "schedule": dict(schedule)}
    config["optimizer"] |= DESCRIPTION["learning_rates"][run.learning_rate]
    if config["optimizer"]["lr_decay_style"] == "WSD":
        config["optimizer"]["lr_wsd_decay_iters"] = budget.tail_iterations
    interval = (budget.iterations - budget.tail_iterations) // model.num_evaluations
    config["train"] |= {
        "train_iters": budget.iterations,
        "seed": run.seed,
        # One evaluation is at the start of the decay.
        "eval_interval": budget.iterations if run.arm.startswith("random_") else interval,
        "eval_iters": 1000,  # all of the text
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
        "eval_interval": max(1, model.foundation_iterations // 3),
        "eval_iters": 1000,
    }
    if model.name == "small":
        config["optimizer"] |= {"lr": 3e-3, "min_lr": 3e-4}
    return config


def evaluation_config(model: ModelSize) -> dict[str, Any]:
    """Returns the configuration that evaluates weights on all held-out text and the probes."""
    config = foundation_config(model)
    config["data"]["sources"] = model.tokens.sources(is_final=True)
    config["train"] |= {
        # The probes' share of a training of an arm's length; no iteration of it is trained.
        "train_iters": model.budget.iterations,
        "eval_interval": model.budget.iterations,
        "eval_probes": model.probe_settings(),
        "probe_interval": model.budget.iterations,
    }
    return config


def _recipe(model: ModelSize, iterations: int) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((HERE / f"{model.name}.yaml").read_text("utf-8"))
    config["train"]["global_batch_size"] = model.budget.samples_per_iteration
    config["data"] = {"seq_length": SEQ_LENGTH}
    # A short run does not consist of its warmup.
    warmup = min(config["optimizer"]["lr_warmup_iters"], iterations // 8)
    config["optimizer"]["lr_warmup_iters"] = warmup
    return config


def training_digest(config: Mapping[str, Any], corpus: str, foundation: str) -> str:
    """Returns a digest of what determines the weights of a run.

    Paths, evaluations, logging and the machine are not in it.

    Args:
        config: The configuration.
        corpus: Digest of the training tokens.
        foundation: The same digest of the foundation, or "" for a foundation.
    """
    kept = {
        section: {k: v for k, v in values.items() if k not in _NO_EFFECT.get(section, set())}
        for section, values in config.items()
        if section not in ("logging", "checkpoint")
    }
    sources = config["data"]["sources"]
    kept["data"]["sources"] = {
        name: {k: v for k, v in sources[name].items() if not k.endswith("paths")}
        for name in SOURCES
    }
    return digest_of(
        {"version": STUDY_VERSION, "config": kept, "corpus": corpus, "foundation": foundation}
    )


class Results:
    """The results of a study, ``results.json``. Every change is written at once, atomically.

    Attributes:
        path: The file.
        entries: Results by `Run.key`, with a hash of the foundation after it for those that repeat
            a run from other weights.
        models: Digests and held-out text of each model, as of its last preparation.
        foundations: Results of the foundations, by model and hash of the weights.
        proposals: Proposed schedules with their predictions, by model.
    """

    def __init__(self, path: Path) -> None:
        """Reads the file if it exists.

        Raises:
            UserError: It is damaged or of another format.
        """
        self.path = path
        self.entries: dict[str, Any] = {}
        self.models: dict[str, Any] = {}
        self.foundations: dict[str, Any] = {}
        self.proposals: dict[str, Any] = {}
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["format_version"]
            self.entries, self.foundations = content["runs"], content["foundations"]
            self.models, self.proposals = content["models"], content["proposals"]
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
            "models": self.models,
            "foundations": self.foundations,
            "proposals": self.proposals,
            "runs": {key: self.entries[key] for key in sorted(self.entries)},
        }
        write_output_file(self.path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def digest(self, run: Run, study: Study) -> str | None:
        """Returns the digest that a run has now; None if its model was never prepared."""
        facts = self.models.get(run.model)
        if facts is None or (run.is_proposed and run.model not in self.proposals):
            return None
        config = make_config(run, study, self.proposals)
        return training_digest(config, facts["corpus"], facts["foundation"])

    def of_run(self, run: Run, study: Study) -> list[dict[str, Any]]:
        """Returns the current entries of a run: one for each foundation that it started from."""
        digest = self.digest(run, study)
        return [
            entry
            for key, entry in self.entries.items()
            if (key == run.key or key.startswith(run.key + "/")) and entry["digest"] == digest
        ]

    def current(self, study: Study) -> tuple[dict[str, Any], dict[str, str]]:
        """Returns the entries that belong to the study as it is now, and why others do not."""
        runs = {run: self.digest(run, study) for run in plan(study)}
        kept, left_out = {}, {}
        for key in sorted(self.entries):
            entry = self.entries[key]
            run = Run.of(entry)
            if run not in runs:
                left_out[key] = "not in the plan"
            elif entry["digest"] != runs[run]:
                left_out[key] = "configuration or corpus has changed"
            elif entry["evaluation"] != self.models[run.model]["evaluation"]:
                left_out[key] = "evaluated on other text"
            else:
                kept[key] = entry
        return kept, left_out

    def add(self, run: Run, entry: dict[str, Any]) -> None:
        """Adds a result and writes the file. It replaces one of the same foundation, or an old one.

        Entries of one run and several foundations stay beside each other.
        """
        key = run.key
        known = self.entries.get(key)
        if known is not None and known["digest"] == entry["digest"]:
            if known["foundation"] != entry["foundation"]:
                key += "/" + entry["foundation"][:8]
        else:
            for old in [one for one in self.entries if one.startswith(run.key + "/")]:
                del self.entries[old]
        self.entries[key] = entry
        self.write()


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
    facts = {
        "corpus": corpus,
        "evaluation": model.evaluation_digest(),
        "foundation": made_of,
        "held_out": {name: {**sizes[name], **overlaps[name]} for name in sizes},
    }
    if results.models.get(model.name) != facts:
        results.models[model.name] = facts
        results.write()
    folder = study.folder / "foundations" / model.name
    record = folder / "foundation.json"
    wanted = {name: facts[name] for name in ("foundation", "evaluation")}
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
    return Prepared(facts["evaluation"], weights, folder / "run")


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
