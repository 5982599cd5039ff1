"""What a resume may change, and what it may not.

Model, tokenizer, data and sequence length have to stay; what differs is refused by its cause.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_chatflow.checkpoint.store import RunState
from megatron_chatflow.config import RunConfig
from megatron_chatflow.errors import UserError


def refuse_other_model(
    resumed: RunState, state: RunState, checkpoint: Path, *, is_grown: bool
) -> None:
    """Refuses a checkpoint of a model of another shape.

    Raises:
        UserError: A size differs that a larger vocabulary does not explain.
    """
    for name in {**resumed.model, **state.model}:
        value, saved = state.model.get(name), resumed.model.get(name)
        if name == "vocab_size" and is_grown:
            continue
        if name == "vocab_size" and isinstance(value, int) and value > int(saved or 0):
            raise UserError(
                f"model.vocab_size: {value} here and {saved} in {checkpoint}; if the tokenizer "
                "goes on from that of the weights, say with --embedding-init how new rows begin"
            )
        if saved != value:
            raise UserError(
                f"model.{name}: {value} here and {saved} in {checkpoint}; give "
                "the model the checkpoint's shape"
            )


def refuse_other_data(
    config: RunConfig, resumed: RunState, state: RunState, checkpoint: Path
) -> None:
    """Refuses a resume whose samples are not those that the run has been trained on.

    Raises:
        UserError: The message names the setting or the dataset that differs.
    """
    if resumed.tokenizer["sha256"] != state.tokenizer["sha256"]:
        raise UserError(
            f"tokenizer.tokenizer_model: is not the one that {checkpoint} was trained with; give "
            "that one, or start from its weights alone with --finetune"
        )
    for name, found in state.sources.items():
        recorded = resumed.sources.get(name)
        if recorded is not None and recorded != found:
            raise UserError(_difference(config, name, recorded, found, checkpoint))


def refuse_other_length(config: RunConfig, resumed: RunState, checkpoint: Path) -> None:
    """Refuses a resume with another sequence length.

    Raises:
        UserError: It says what is possible instead.
    """
    length = config.data.seq_length
    recorded = [resumed.schedule.get("seq_length")]
    recorded += [source.get("seq_length") for source in resumed.sources.values()]
    other = next((one for one in recorded if one not in (None, length)), None)
    if other is not None:
        raise UserError(
            f"data.seq_length: {length} here and {other} in {checkpoint}; a run keeps its sequence "
            "length, because its samples and its schedule are counted by it. Give --seq-length "
            f"{other}, or begin a new run of length {length} with these weights: --finetune and "
            "another --save"
        )


def _difference(
    config: RunConfig, name: str, recorded: Mapping[str, Any], found: Mapping[str, Any], at: Path
) -> str:
    """Why a source's samples are not the recorded ones, and what to do."""
    way_out = "or start from its weights alone with --finetune"
    path = f"data.sources.{name}"
    if recorded.get("packing") != found["packing"]:
        was, now = recorded.get("packing"), found["packing"]
        if was is not None and now is not None:
            return (
                f"{path}.packing: best_fit of version {now} here and {was} in {at}; resume with "
                f"the version of this package that began the run, {way_out}"
            )
        was, now = ("none" if one is None else "best_fit" for one in (was, now))
        return f"{path}.packing: {now} here and {was} in {at}; give {was}, {way_out}"
    if recorded.get("holdout_every") != found["holdout_every"]:
        was, now = (
            "none" if one is None else str(one)
            for one in (recorded.get("holdout_every"), found["holdout_every"])
        )
        return (
            f"data.holdout_every: {now} for {path} here and {was} in {at}, which decides what is "
            f"trained on (validation_paths make it none); give what the run began with, {way_out}"
        )
    before, after = recorded.get("datasets") or [], found["datasets"]
    paths = config.data.sources[name].paths
    if before == after:
        return (
            f"{path}: its {found['num_samples']} samples here were {recorded.get('num_samples')} "
            f"in {at}; resume with the version of this package that began the run, {way_out}"
        )
    if len(before) != len(after):
        what = f"lists {len(after)} datasets here and {len(before)} in {at}"
        return f"{path}.paths: {what}; give the same ones, or put new data into a new source"
    if sorted(map(str, before)) == sorted(map(str, after)):
        return f"{path}.paths: lists the datasets of {at} in another order; give that of before"
    number = next(n for n, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1])
    was, now = before[number], after[number]
    place = f"{path}.paths[{number}]: {paths[number]}"
    sizes = ("num_documents", "num_tokens")
    if ("sha256" in was) != ("sha256" in now) and all(was.get(k) == now.get(k) for k in sizes):
        change = "has no .json beside it, and had one" if "sha256" in was else "has got a .json"
        verb = "put it back" if "sha256" in was else "take it away"
        return (
            f"{place} {change} when {at} was saved, so that nothing shows whether it is the same "
            f"data; {verb}, {way_out}"
        )
    return (
        f"{place} is not the data that {at} was trained on ({was.get('num_documents')} documents "
        f"and {was.get('num_tokens')} tokens there, {now.get('num_documents')} and "
        f"{now.get('num_tokens')} here); give the same files, {way_out}"
    )
