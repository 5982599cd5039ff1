"""The runs of the study: what they are, what determines them, and in which order they are trained.

A `Run` is a model, an arm, the shape of its learning rate and a seed. Its result is one entry of
``results.json``, with a digest of what determines its weights: the configuration without what
cannot change them, the training tokens, and the configuration of the foundation. Runs whose entry
has the same digest are not trained again, on whatever machine. What evaluates the weights,
held-out text and probes, has a digest of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

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
    text_folder,
)

HERE = Path("examples/transfer_study")
LEARNING_RATES: tuple[str, ...] = tuple(DESCRIPTION["learning_rates"])
REFERENCE = "static"
PROPOSED = "proposed"
PROPOSED_STATIC = "proposed_static"
"""The proposed schedule, and the static one that draws the same samples of each source."""
SEQ_LENGTH = 512
"""Tokens of a sample, in all recipes."""

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
        Stage("smollm2", ("static/tail", "dynamic/tail", "english_only", "reversed/tail"), (1,)),
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
