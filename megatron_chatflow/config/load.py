"""Loads a run's configuration from the defaults, a YAML file and flags.

The file overrides the defaults, and flags override the file. This module also applies flags that
set several fields, such as ``--lr-warmup-fraction``, and completes the model section from the
Hugging Face folder of ``checkpoint.load_hf``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_chatflow.config.architectures import (
    NULLABLE_FIELDS,
    PRESETS,
    ROPE_FIELDS,
    without_other_rope,
)
from megatron_chatflow.config.fields import parse_count
from megatron_chatflow.config.flags import RunOptions, parse_arguments
from megatron_chatflow.config.huggingface import model_of_huggingface
from megatron_chatflow.config.validation import RunConfig, removed_settings
from megatron_chatflow.config.yaml_file import read_yaml
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import is_url
from megatron_chatflow.remote import CachedPath, download_folder, parse_location

SMALL_HUGGINGFACE_FILES = (".json", ".model", ".jinja", ".txt")
"""Suffixes of the files of a Hugging Face folder besides its weights."""


def _overlay(base: dict[str, Any], flags: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Merges the values of flags over ``base``. Neither argument is modified."""
    merged = dict(base)
    given_flags = {section: dict(values) for section, values in flags.items()}
    data, optimizer = given_flags.get("data", {}), given_flags.get("optimizer", {})
    boundaries, split = data.pop("boundaries", None), data.pop("default_split", None)
    fraction = optimizer.pop("lr_warmup_fraction", None)
    flags = given_flags
    for section, values in flags.items():
        below = merged.get(section)
        if below is None:
            below = {}
        if isinstance(below, Mapping):  # validation reports any other type with its path
            merged[section] = {**below, **values}
    # The two fields of a pair exclude each other, so a flag for one unsets the other.
    for section, pair in (
        ("train", ("train_iters", "train_samples")),
        ("data", ("holdout_every", "split")),
    ):
        given = [name for name in pair if name in flags.get(section, {})]
        if len(given) == 1 and isinstance(merged[section], Mapping):
            (other,) = set(pair) - set(given)
            merged[section] = {**merged[section], other: None}
    given_data = merged.get("data")
    if split is not None and isinstance(given_data, Mapping):
        if not any(given_data.get(name) for name in ("split", "holdout_every")):
            merged["data"] = {**given_data, "split": split}
    if boundaries is not None:
        _isolate_documents(merged)
    if fraction is not None:
        _set_warmup(merged, fraction)
    return merged


def _isolate_documents(values: dict[str, Any]) -> None:
    """Sets ``boundaries: isolate`` in every source that does not set ``boundaries``."""
    data = values.get("data")
    sources = data.get("sources") if isinstance(data, Mapping) else None
    if isinstance(data, Mapping) and isinstance(sources, Mapping):
        isolated = {
            name: {"boundaries": "isolate", **source} if isinstance(source, Mapping) else source
            for name, source in sources.items()
        }
        values["data"] = {**data, "sources": isolated}


def _set_warmup(values: dict[str, Any], fraction: float) -> None:
    """Sets the warmup of Megatron-LM's --lr-warmup-fraction, a fraction of the decay's length.

    In another cycle, the length is that from the start of the cycle on.

    Raises:
        UserError: The start of the cycle has another unit.
    """
    optimizer, train = values.get("optimizer") or {}, values.get("train") or {}
    for unit, other in (("iters", "samples"), ("samples", "iters")):
        length = optimizer.get(f"lr_decay_{unit}") or train.get(f"train_{unit}")
        if length is not None:
            if optimizer.get(f"lr_cycle_start_{other}"):
                raise UserError(
                    f"--lr-warmup-fraction: is a fraction of {unit}, and optimizer.lr_cycle_start_"
                    f"{other} is set; set lr_cycle_start_{unit} instead, or lr_warmup_{other}"
                )
            start = parse_count(optimizer.get(f"lr_cycle_start_{unit}") or 0)
            warmup = round(fraction * max(parse_count(length) - start, 0))
            values["optimizer"] = {**optimizer, f"lr_warmup_{unit}": warmup}
            return


def _read(path: Path | None, flags: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return _overlay({} if path is None else read_yaml(path), flags)


def _load(values: dict[str, Any]) -> RunConfig:
    folder = _huggingface_folder(values)
    if folder is None:
        return RunConfig.from_dict(values)
    shape = model_of_huggingface(folder)
    config = RunConfig.from_dict(_with_shape(values, shape, folder))
    _refuse_other_shape(config, shape, folder)
    return config


def _huggingface_folder(values: Mapping[str, Any]) -> Path | None:
    checkpoint = values.get("checkpoint")
    folder = checkpoint.get("load_hf") if isinstance(checkpoint, Mapping) else None
    if isinstance(folder, str) and is_url(folder):
        location = parse_location(folder)
        if not is_url(location):
            return Path(location)
        copy = CachedPath.of(location)
        download_folder(copy, SMALL_HUGGINGFACE_FILES, "config.json")
        return copy
    return Path(folder).expanduser() if isinstance(folder, str | Path) and str(folder) else None


def _with_shape(
    values: Mapping[str, Any], shape: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Fills unset values of the model and tokenizer sections from the Hugging Face folder."""
    # The vocabulary size also depends on the tokenizer, which is not loaded yet.
    defaults = {name: value for name, value in shape.items() if name != "vocab_size"}
    filled = dict(values)
    sections = {"model": defaults}
    if any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        sections["tokenizer"] = {"tokenizer_model": str(folder), "tokenizer_type": "auto"}
    for section, fill in sections.items():
        given = values.get(section) or {}
        if not isinstance(given, Mapping) or (
            section == "tokenizer" and "tokenizer_model" in given
        ):
            continue
        present = {
            name: value
            for name, value in given.items()
            if value is not None or (section == "model" and name in NULLABLE_FIELDS)
        }
        if section == "model":
            fill = without_other_rope(fill, present)
        filled[section] = {**fill, **present}
    return filled


def _refuse_other_shape(config: RunConfig, shape: Mapping[str, Any], folder: Path) -> None:
    """Rejects a model section that contradicts the folder's config.json."""
    preset = PRESETS[config.model.preset] if config.model.preset else {}
    free = {"init_method_std", "vocab_size", "max_position_embeddings"}
    if config.model.rope_scaling_type == "dynamic":  # scaling begins at this length
        free.remove("max_position_embeddings")
    names = dict.fromkeys([*shape, *ROPE_FIELDS, "kv_channels", "window_size"])
    for name in names:
        ours = {getattr(config.model, name), preset.get(name, getattr(config.model, name))}
        if name not in free and ours != {shape.get(name)}:
            shown = next(value for value in ours if value != shape.get(name))
            raise UserError(
                f"model.{name}: {shown} differs from {shape.get(name)} in "
                f"{folder / 'config.json'}; remove it to use the folder's value"
            )


def load_config(yaml_path: str | Path | None, flags: Sequence[str] = ()) -> RunConfig:
    """Loads a run's configuration from a YAML file and flags.

    Args:
        yaml_path: The YAML file. If None, the flags must set every required field.
        flags: Arguments such as ``["--train-iters", "100"]``. They override the file.

    Raises:
        UserError: If the file cannot be read, or a value in the file or the flags is invalid.
    """
    path = None if yaml_path is None else Path(yaml_path)
    return _load(_read(path, parse_arguments(flags, with_options=False)[0]))


def load_config_from_argv(arguments: Sequence[str]) -> tuple[RunConfig, RunOptions]:
    """Loads a run's configuration and the options from a command line, as `load_config` does."""
    flags, options = parse_arguments(arguments)
    if options.config is None and "sources" not in flags.get("data", {}):
        raise UserError("--config: is missing; give the run's YAML file, see --help")
    if options.world_size is not None and options.world_size < 1:
        raise UserError(f"--world-size: must be at least 1, not {options.world_size}")
    values = _read(options.config, flags)
    return _load(values), replace(options, removed=tuple(removed_settings(values)))
