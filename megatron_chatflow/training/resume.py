"""Checks what a resume changes.

Model, tokenizer, data, sequence length and the order of the current epoch must stay the same; an
error names what differs. Everything else may change, and is listed once with its consequences.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from megatron_chatflow.blend.adaptive import AdaptiveBlend
from megatron_chatflow.blend.blend import Blend
from megatron_chatflow.checkpoint.store import RunState
from megatron_chatflow.config import (
    OptimizerConfig,
    RunConfig,
    RunLength,
    ScheduleConfig,
    SourceConfig,
    TrainConfig,
    to_plain,
)
from megatron_chatflow.config.learning_rate import learning_rates
from megatron_chatflow.config.yaml_file import read_yaml
from megatron_chatflow.data.fingerprint import dataset_files
from megatron_chatflow.data.packing import ALGORITHM_VERSION
from megatron_chatflow.data.source import Source
from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime.table import Row

logger = logging.getLogger(__name__)

_WIDEST_CELL = 40
_HASHES = "block_hash"  # key of a source's fingerprint: hashes of each file's sample blocks

# These describe how a process starts, which differs between a first start and a restart.
_OF_ONE_START = {
    "checkpoint.load",
    "checkpoint.load_hf",
    "checkpoint.pretrained_checkpoint",
    "checkpoint.finetune",
    "checkpoint.from_scratch",
    "checkpoint.load_optim",
    "train.new_data_seed",
}
_LENGTH = {
    f"train.{name}"
    for name in ("train_iters", "train_samples", "global_batch_size", "rampup_batch_size")
}
_LEARNING_RATE = _LENGTH | {
    f"optimizer.{name}"
    for name in ("lr", "min_lr", "lr_decay_style", "lr_wsd_decay_style", "lr_warmup_init")
}
_LEARNING_RATE |= {
    f"optimizer.lr_{what}_{unit}"
    for what in ("warmup", "decay", "wsd_decay", "cycle_start")
    for unit in ("iters", "samples")
}

_CONSEQUENCES = {
    "paths": "the same data",  # this and the following of data.sources.NAME
    "validation_paths": "validation uses other samples",
    "loss": "other tokens count in the loss from now on",
    "objective_weight": "the source counts otherwise in the objective from now on",
    "boundaries": "attention sees other tokens from now on",
    "train.seed": "applies from the next epoch of each source",
    "tokenizer.tokenizer_model": "the same tokenizer",
    "optimizer.no_weight_decay": "other tensors have weight decay from now on",
}
_CONSEQUENCES |= dict.fromkeys(
    [f"optimizer.{name}" for name in ("decoupled_lr", "decoupled_min_lr")],
    "embedding and output layer have another learning rate from now on",
)
_CONSEQUENCES |= dict.fromkeys(
    [
        f"optimizer.{part}weight_decay{end}"
        for part, end in (("", ""), ("", "_incr_style"), ("start_", ""), ("end_", ""))
    ],
    "another weight decay from now on",
)
_CONSEQUENCES |= dict.fromkeys(
    [
        *(f"train.{name}" for name in ("bf16", "transformer_impl", "fp4_format")),
        *(f"train.fp8_{name}" for name in ("format", "recipe", "param_gather")),
    ],
    "losses change by rounding errors",
)
_NUM_COMPARED = 1 << 16  # positions at which learning rates are compared at once


def check_same_model(
    resumed: RunState, state: RunState, checkpoint: Path, *, is_grown: bool
) -> None:
    """Checks that the checkpoint's model has the same shape, except for a grown vocabulary."""
    for name in {**resumed.model, **state.model}:
        value, saved = state.model.get(name), resumed.model.get(name)
        if name == "vocab_size" and is_grown:
            continue
        if name == "vocab_size" and isinstance(value, int) and value > int(saved or 0):
            raise UserError(
                f"model.vocab_size: {value} here and {saved} in {checkpoint}; if the tokenizer "
                "extends the one of the weights, set --embedding-init to initialize the new rows"
            )
        if saved != value:
            raise UserError(
                f"model.{name}: {value} here and {saved} in {checkpoint}; use the checkpoint's "
                "value"
            )


def check_same_data(
    config: RunConfig, resumed: RunState, state: RunState, checkpoint: Path
) -> None:
    """Checks that the samples are those that the run has been trained on."""
    if resumed.tokenizer.get("sha256") != state.tokenizer["sha256"]:
        raise UserError(
            f"tokenizer.tokenizer_model: is not the tokenizer that {checkpoint} was trained "
            "with; use that tokenizer, or start a new run from the weights with --finetune"
        )
    for name, found in state.sources.items():
        recorded = resumed.sources.get(name)
        if recorded is None:
            continue
        # Older checkpoints have no block hashes; those of loss masks depend on the loss setting.
        before, after = ({k: v for k, v in s.items() if k != _HASHES} for s in (recorded, found))
        if before != after:
            raise UserError(_difference(config, name, before, after, checkpoint))
        _check_same_contents(config, name, recorded, found, checkpoint)


def _check_same_contents(
    config: RunConfig, name: str, recorded: Mapping[str, Any], found: Mapping[str, Any], at: Path
) -> None:
    """Checks that files of the same size still have the sample blocks that ``at`` recorded."""
    for number, (was, now) in enumerate(
        zip(recorded.get(_HASHES) or (), found.get(_HASHES) or (), strict=False)
    ):
        for kind, hash_now in now.items():
            if was.get(kind, hash_now) != hash_now:
                prefix = config.data.sources[name].paths[number]
                path = dataset_files(prefix, with_loss_mask=True)[kind]
                raise UserError(
                    f"data.sources.{name}.paths[{number}]: {path}: the size is unchanged, but "
                    f"the content differs from when {at} was saved; restore the original file, "
                    "or start a new run from the weights with --finetune"
                )


def check_same_seq_length(config: RunConfig, resumed: RunState, checkpoint: Path) -> None:
    """Checks that the sequence length is unchanged."""
    length = config.data.seq_length
    recorded = [resumed.schedule.get("seq_length")]
    recorded += [source.get("seq_length") for source in resumed.sources.values()]
    other = next((one for one in recorded if one not in (None, length)), None)
    if other is not None:
        raise UserError(
            f"data.seq_length: {length} here and {other} in {checkpoint}; the sequence length of "
            "a run cannot change, because samples and schedule are counted in it. Use "
            f"--seq-length {other}, or start a new run of length {length} from these weights "
            "with --finetune and another --save"
        )


def _difference(
    config: RunConfig, name: str, recorded: Mapping[str, Any], found: Mapping[str, Any], at: Path
) -> str:
    """Describes why a source's samples differ from the recorded ones, and what to do."""
    way_out = "or start a new run from the weights with --finetune"
    path = f"data.sources.{name}"
    if recorded.get("packing") != found["packing"]:
        was, now = recorded.get("packing"), found["packing"]
        if was is not None and now is not None and was > ALGORITHM_VERSION:
            return (
                f"{path}.packing: best_fit version {now} here and {was} in {at}; resume with the "
                f"package version that started the run, {way_out}"
            )
        if was is None or now is None:
            was, now = ("none" if one is None else "best_fit" for one in (was, now))
            return f"{path}.packing: {now} here and {was} in {at}; set it to {was}, {way_out}"
    if recorded.get("holdout_every") != found["holdout_every"]:
        was, now = (
            "none" if one is None else str(one)
            for one in (recorded.get("holdout_every"), found["holdout_every"])
        )
        return (
            f"data.holdout_every: {now} for {path} here and {was} in {at}, which changes the "
            "training documents (with validation_paths it is none); restore the setting the run "
            f"started with, {way_out}"
        )
    if recorded.get("split") != found.get("split"):
        was, now = (
            "none" if one is None else ",".join(f"{100 * share:g}" for share in one)
            for one in (recorded.get("split"), found.get("split"))
        )
        return (
            f"data.split: {now} (in percent) for {path} here and {was} in {at}, which changes "
            f"the training documents; restore the setting the run started with, {way_out}"
        )
    before, after = recorded.get("datasets") or [], found["datasets"]
    paths = config.data.sources[name].paths
    if before == after:
        if recorded.get("loss_masks") != found.get("loss_masks"):
            return (
                f"{path}.loss: packing skips documents without loss tokens, and these differ "
                f"from {at}; restore the loss setting and the loss masks the run started with, "
                f"{way_out}"
            )
        return (
            f"{path}: has {found['num_samples']} samples here and {recorded.get('num_samples')} "
            f"in {at}; resume with the package version that started the run, {way_out}"
        )
    if len(before) != len(after):
        what = f"lists {len(after)} datasets here and {len(before)} in {at}"
        return f"{path}.paths: {what}; use the same datasets, and put new data into a new source"
    if sorted(map(str, before)) == sorted(map(str, after)):
        return (
            f"{path}.paths: lists the datasets of {at} in another order; restore the original order"
        )
    number = next(n for n, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1])
    was, now = before[number], after[number]
    place = f"{path}.paths[{number}]: {paths[number]}"
    sizes = ("num_documents", "num_tokens")
    if ("sha256" in was) != ("sha256" in now) and all(was.get(k) == now.get(k) for k in sizes):
        change = (
            "no longer has a .json file, but had one"
            if "sha256" in was
            else "now has a .json file, but had none"
        )
        verb = "restore the file" if "sha256" in was else "remove the file"
        return (
            f"{place} {change} when {at} was saved, so the data cannot be verified to be the "
            f"same; {verb}, {way_out}"
        )
    return (
        f"{place} is not the data that {at} was trained on ({was.get('num_documents')} documents "
        f"and {was.get('num_tokens')} tokens in the checkpoint, {now.get('num_documents')} and "
        f"{now.get('num_tokens')} here); use the same files, {way_out}"
    )


def recorded_settings(checkpoint: Path) -> dict[str, Any]:
    """Reads the configuration that a checkpoint was saved with; {} if it has none."""
    path = checkpoint / "config.yaml"
    return read_yaml(path) if path.is_file() else {}


def data_seeds(
    config: RunConfig,
    sources: Sequence[Source],
    blend: Blend | AdaptiveBlend,
    resumed: RunState | None,
    checkpoint: Path | None,
) -> dict[str, Any]:
    """Returns the seeds of each source's order as pairs of first epoch and seed.

    ``resumed`` and ``checkpoint`` are None for a new run.

    Raises:
        UserError: The seed has changed without ``--new-data-seed``.
    """
    seed = config.train.seed
    begin: dict[str, Any] = {source.name: [[0, seed]] for source in sources}
    if resumed is None or checkpoint is None:
        return begin
    recorded = resumed.data_seeds
    if not recorded:  # written by an earlier version
        train = recorded_settings(checkpoint).get("train")
        first = train.get("seed") if isinstance(train, Mapping) else None
        if type(first) is not int:
            logger.warning(
                "%s does not record a seed, so it cannot be compared with train.seed", checkpoint
            )
            first = seed
        recorded = {name: [[0, first]] for name in resumed.sources}
    counts = blend.counts(resumed.consumed_samples).tolist()
    seeds = {**recorded, **{name: one for name, one in begin.items() if name not in recorded}}
    for source, count in zip(sources, counts, strict=True):
        history = seeds[source.name]
        if history[-1][1] == seed:
            continue
        # A source without drawn samples has no order to keep.
        if count and not config.train.new_data_seed:
            raise UserError(
                f"train.seed: {seed} here and {history[-1][1]} in {checkpoint}; a new order "
                f"would repeat some documents of {source.name} and skip others in the current "
                f"epoch. Use --seed {history[-1][1]}, or --new-data-seed to apply the new seed "
                "from the next epoch of each source"
            )
        epoch = -(-count // max(source.num_samples, 1))
        kept = [pair for pair in history if pair[0] < epoch]
        seeds[source.name] = kept if kept and kept[-1][1] == seed else [*kept, [epoch, seed]]
    return seeds


def changed_settings(
    config: RunConfig,
    checkpoint: Path,
    resumed: RunState,
    blend: Blend | AdaptiveBlend,
    length: RunLength,
    stage_change: str = "",
) -> list[Row]:
    """Lists every setting that differs from the checkpoint's, with its consequence.

    ``stage_change`` is what changes in the stages of training, see `stages.check_edit`.
    """
    recorded = recorded_settings(checkpoint)
    if not recorded:
        logger.warning("%s has no config.yaml, so settings cannot be compared", checkpoint)
        return []
    was, now = _flat(recorded), _flat(config.to_dict())
    names = [
        set(_section(one, "data").get("sources") or {}) for one in (recorded, config.to_dict())
    ]
    left = (
        f"{length.remaining_iterations():,} iterations are left, up to sample "
        f"{length.num_samples:,}"
    )
    # Several settings change the length and the learning rate; the first one listed reports it.
    once = {left: _LENGTH, _learning_rate_change(config, was, length, resumed): _LEARNING_RATE}
    rows: list[tuple[str, str, str, str]] = []
    for key, value in now.items():
        source = key.split(".")[2] if key.startswith("data.sources.") else None
        before = was.get(key, _default(key))
        if key == "data.schedule":
            before = _with_defaults(before)
        if source and key == f"data.sources.{source}.loss":
            before, value = before or "all", value or "all"
        if key in _OF_ONE_START or before == value or (source and source not in names[0]):
            continue
        shown = _show(key, before), _show(key, value)
        if shown[0] == shown[1]:
            shown = shown[0], f"{shown[1]} (edited)"
        texts = [text for text, settings in once.items() if key in settings]
        once = {text: settings for text, settings in once.items() if text not in texts}
        texts += _consequences(key, before, value, blend, config)
        if key == "train.stages":
            texts.append(stage_change or "the same stages")
        rows.append((key, *shown, "; ".join(filter(None, texts))))
    for source in sorted(names[1] - names[0]):
        assert isinstance(blend, Blend), "a run with a controller keeps its sources"
        draw = blend.first_draw(blend.sources.index(source), 0)
        what = "never drawn from" if draw is None else f"first drawn from at sample {draw:,}"
        rows.append((f"data.sources.{source}", "-", "added", what))
    rows += [(f"data.sources.{name}", "there", "-", "") for name in sorted(names[0] - names[1])]
    heads = ("setting", "checkpoint", "now", "consequence")
    return [dict(zip(heads, row, strict=True)) for row in rows]


def _with_defaults(schedule: Any) -> Any:
    """Completes a recorded schedule with the keys that an earlier version did not have."""
    try:
        return to_plain(ScheduleConfig(**schedule))
    except (ValidationError, UserError, TypeError):
        return schedule


def _consequences(
    key: str, before: Any, value: Any, blend: Blend | AdaptiveBlend, config: RunConfig
) -> list[str]:
    """Returns the consequences of a setting that has changed, if there are any to report."""
    train = config.train
    if key in ("train.global_batch_size", "train.eval_iters") and train.eval_interval:
        samples = train.eval_iters * train.global_batch_size
        return [f"validation reads up to {samples:,} samples per source"]
    if key == "data.schedule":
        edit = blend.edit
        texts = ["the same weights" if edit is None else f"edited at sample {edit.begin:,}"]
        if isinstance(blend, AdaptiveBlend):
            texts = ["the same decisions"]
            if _deciding(before) != _deciding(value):
                texts = [f"decisions differ from sample {blend.decided_samples:,} on"]
        if _objective_knots(before) != _objective_knots(value):
            texts.append("sources count otherwise in the objective from now on")
        return texts
    if key == "optimizer.ema_decay":
        if value is None:
            return ["the average ends here"]
        begins = "the average starts at the weights of the checkpoint"
        return [begins if before is None else "the average moves at another speed from now on"]
    name = key.rpartition(".")[2] if key.startswith("data.sources.") else key
    return [_CONSEQUENCES[name]] if name in _CONSEQUENCES else []


def _deciding(schedule: Any) -> Any:
    """Returns the settings that later decisions of a controller follow from; None of a replay."""
    found = schedule.get("controller") if isinstance(schedule, Mapping) else None
    if not isinstance(found, Mapping) or found.get("name") == "replay":
        return None
    # The horizon cannot change, except for the unit in which it is written.
    return {key: value for key, value in found.items() if key != "horizon"}


def _objective_knots(schedule: Any) -> Any:
    """Returns what the weights in the objective depend on; None if no knot has any."""
    knots = schedule.get("knots") if isinstance(schedule, Mapping) else None
    if not isinstance(knots, list) or not any(knot.get("objective_weights") for knot in knots):
        return None
    return [[knot.get(key) for key in ("at", "ramp", "objective_weights")] for knot in knots]


def _learning_rate_change(
    config: RunConfig, was: Mapping[str, Any], length: RunLength, resumed: RunState
) -> str:
    """Describes the change of the learning rate; empty if the old settings cannot be read."""
    try:
        old: Any = SimpleNamespace(
            optimizer=OptimizerConfig(**_fields_of(OptimizerConfig, "optimizer", was)),
            train=TrainConfig(**_fields_of(TrainConfig, "train", was)),
        )
    except (ValidationError, UserError, TypeError):
        return ""
    if old.train.train_iters is None and old.train.train_samples is None:  # a damaged config.yaml
        return ""
    first = resumed.blend["segments"][0]["schedule"]["samples_per_iteration"]
    place = (resumed.iteration, resumed.consumed_samples)
    before = RunLength.of(old, *place, int(first))

    def rates(done: npt.NDArray[np.int64]) -> list[npt.NDArray[np.float64]]:
        """Returns the old and new rates of the iterations after ``done`` ones of this process."""
        samples = length.batch_sizes.samples_after(place[1], done)
        return [
            learning_rates(
                optimizer,
                its,
                (samples if its.counts_samples else place[0] + done) - its.lr_start,
            )
            for optimizer, its in ((old.optimizer, before), (config.optimizer, length))
        ]

    found = _first_other_rate(rates, 0, max(length.remaining_iterations(), 1))
    if found is not None:
        was_rate, rate = (float(one[0]) for one in rates(np.array([found])))
        return (
            f"learning rate of iteration {place[0] + found + 1:,}: {rate:.4g} instead of "
            f"{was_rate:.4g}"
        )
    if (before.lr_decay, before.counts_samples) != (length.lr_decay, length.counts_samples):
        unit = "sample" if length.counts_samples else "iteration"
        return f"learning rate decay ends at {unit} {length.lr_decay:,}"
    return ""


def _first_other_rate(
    rates: Callable[[npt.NDArray[np.int64]], Sequence[npt.NDArray[np.float64]]],
    begin: int,
    end: int,
) -> int | None:
    """Returns the first number in ``[begin, end)`` at which two rates differ, or None.

    In a long run, it is searched between the first two of `_NUM_COMPARED` equally distant ones
    that differ, which no schedule misses that changes over more than such a distance.
    """
    step = -(-(end - begin) // _NUM_COMPARED)
    numbers = np.arange(begin, end, step)
    old, new = rates(numbers)
    differs = ~np.isclose(old, new, rtol=1e-9, atol=0.0)
    if not differs.any():
        return None
    first = int(numbers[np.argmax(differs)])
    return first if step == 1 else _first_other_rate(rates, max(begin, first - step + 1), first + 1)


def _section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = settings.get(name)
    return section if isinstance(section, Mapping) else {}


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens settings to dotted paths; a schedule is one setting."""
    found: dict[str, Any] = {}
    for section, values in settings.items():
        for name, value in _section(settings, section).items() if values else ():
            if (section, name) != ("data", "sources"):
                found[f"{section}.{name}"] = value
            elif isinstance(value, Mapping):
                for source, its in value.items():
                    if isinstance(its, Mapping):
                        path = f"data.sources.{source}"
                        found |= {f"{path}.{field}": one for field, one in its.items()}
    return found


def _fields_of(section_class: Any, section: str, was: Mapping[str, Any]) -> dict[str, Any]:
    names = [field.name for field in fields(section_class)]
    return {name: was[f"{section}.{name}"] for name in names if f"{section}.{name}" in was}


def _default(key: str) -> Any:
    """Returns the default of a setting, which an earlier version without it used."""
    section, _, name = key.partition(".")
    if key.startswith("data.sources."):
        section_class: Any = SourceConfig
        name = key.rpartition(".")[2]
    else:
        section_class = get_type_hints(RunConfig)[section]
    default = section_class.__pydantic_fields__[name].default
    return None if default is PydanticUndefined else to_plain(default)


def _show(key: str, value: Any) -> str:
    """Formats a value for the table."""
    if key == "data.schedule" and isinstance(value, Mapping):
        knots = value.get("knots") or ()
        return f"{len(knots)} knots in {value.get('unit', 'samples')}"
    if value is None:
        return "-"
    if key == "train.stages" and isinstance(value, list):
        return f"{len(value)} stages"
    if isinstance(value, bool):
        return str(value).lower()
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    half = _WIDEST_CELL // 2
    return text if len(text) <= _WIDEST_CELL else f"{text[: half - 2]}...{text[-half + 1 :]}"
