"""From a YAML file and flags to a run's configuration: defaults < YAML < flags.

In: a path, or none, and arguments. Out: a `RunConfig`, checked as a whole once.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_chatflow.config.flags import RunOptions, parse_arguments
from megatron_chatflow.config.run_config import RunConfig
from megatron_chatflow.config.yaml_file import read_yaml
from megatron_chatflow.errors import UserError


def _overlay(base: dict[str, Any], flags: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """``base`` with the flags' values over it; neither is changed."""
    merged = dict(base)
    for section, values in flags.items():
        below = merged.get(section)
        if below is None:
            below = {}
        if isinstance(below, Mapping):  # anything else is refused, by its path, in validation
            merged[section] = {**below, **values}
    # The length of a run is one setting with two spellings: a flag replaces the file's.
    given = flags.get("train", {}).keys() & {"train_iters", "train_samples"}
    if len(given) == 1 and isinstance(merged["train"], Mapping):
        other = "train_samples" if "train_iters" in given else "train_iters"
        merged["train"] = {**merged["train"], other: None}
    return merged


def _load(path: Path | None, flags: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    return RunConfig.from_dict(_overlay({} if path is None else read_yaml(path), flags))


def load_config(yaml_path: Path | None, flags: Sequence[str] = ()) -> RunConfig:
    """The configuration of a YAML file with flags over it.

    Args:
        yaml_path: The file; without one the flags have to say everything.
        flags: Arguments such as ``["--train-iters", "100"]``.

    Raises:
        UserError: The file cannot be read, or something in it or in the flags is wrong.
    """
    return _load(yaml_path, parse_arguments(flags, with_options=False)[0])


def load_config_from_argv(arguments: Sequence[str]) -> tuple[RunConfig, RunOptions]:
    """The configuration and the options of a command line.

    Args:
        arguments: The command line without the program's name.

    Raises:
        UserError: See `load_config`.
        SystemExit: ``--help`` was among the arguments and has been answered.
    """
    flags, options = parse_arguments(arguments)
    if options.config is None:
        raise UserError("--config: is missing; give the run's YAML file, see --help")
    if options.world_size is not None and options.world_size < 1:
        raise UserError(f"--world-size: must be at least 1, not {options.world_size}")
    return _load(options.config, flags), options
