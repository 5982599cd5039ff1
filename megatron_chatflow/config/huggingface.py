"""Converts the config.json of a Hugging Face model to a model section.

`config.architectures` lists the supported architectures.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_chatflow.config.architectures import (
    ARCHITECTURES,
    CONFIG_NAMES,
    DEFAULTS,
    Architecture,
    is_positive_number,
    longest_text,
    rope_of_huggingface,
    supported_classes,
)
from megatron_chatflow.config.fields import MAX_LAYERS, shorten
from megatron_chatflow.errors import UserError

_LARGEST_SIZE = 2**31 - 1


def read_huggingface_config(folder: Path) -> dict[str, Any]:
    """Reads the config.json of a Hugging Face folder, which must be a JSON object."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder}: has no config.json; give the path of a Hugging Face model folder"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged ({error}); download the folder again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: is damaged (not a JSON object); download the folder again")
    return config


def model_of_huggingface(folder: Path) -> dict[str, Any]:
    """Reads the values of the model section, including ``vocab_size``, from a Hugging Face folder.

    Raises:
        UserError: If config.json is invalid, or the model is of an unsupported architecture or has
            unsupported parts.
    """
    return model_of_config(folder / "config.json", read_huggingface_config(folder))


def architecture_of_config(path: Path, config: Mapping[str, Any]) -> Architecture:
    """Returns the architecture that a config.json names; the path is for messages."""
    kind = config.get("model_type")
    named = config.get("architectures") or kind
    name = named[0] if isinstance(named, list) else named
    if kind not in tuple(ARCHITECTURES) or name not in (kind, ARCHITECTURES[kind].class_name):
        shown = shorten(name).strip("'")
        raise UserError(
            f"{path}: architecture {shown} is not supported; supported architectures are "
            f"{supported_classes()}"
        )
    return ARCHITECTURES[kind]


def model_of_config(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of the model section for a config.json, as `model_of_huggingface`.

    The ``rope_`` fields are present only if the model has rotary scaling, and ``kv_channels`` only
    if the sizes of the heads do not add up to the hidden size. The path is for messages.
    """
    architecture = architecture_of_config(path, config)
    config = {**DEFAULTS, **architecture.defaults, **config}
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = config.get("num_attention_heads")
    for name, ours in CONFIG_NAMES.items():
        value: Any = config.get(name)
        is_size = ours not in ("norm_epsilon", "init_method_std")
        if not is_positive_number(value) or (is_size and not isinstance(value, int)):
            raise UserError(f"{path}: {name} is missing or not a positive number; correct it")
        largest = MAX_LAYERS if ours == "num_layers" else _LARGEST_SIZE
        if is_size and value > largest:
            raise UserError(f"{path}: {name} must be at most {largest}, not {shorten(value)}")
    _refuse_variants(path, config, architecture)
    rope = rope_of_huggingface(path, config)
    window = _window(path, config, architecture, rope)
    head_dim = config.get("head_dim")
    if head_dim is not None and head_dim * config["num_attention_heads"] != config["hidden_size"]:
        rope["kv_channels"] = head_dim
    return {
        **{ours: config[theirs] for theirs, ours in CONFIG_NAMES.items()},
        **rope,
        "norm_epsilon": float(config["rms_norm_eps"]),
        "init_method_std": float(config["initializer_range"]),
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "add_qkv_bias": architecture.add_qkv_bias,
        "qk_layernorm": architecture.qk_layernorm,
        "window_size": None if window is None else (window - 1, 0),
    }


def _refuse_variants(path: Path, config: Mapping[str, Any], architecture: Architecture) -> None:
    """Rejects models that could be loaded but would compute different results."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, hidden_size = config.get("head_dim"), config["hidden_size"]
    is_divided = head_dim is not None or hidden_size % heads == 0
    if not is_divided or heads % groups:
        raise UserError(
            f"{path}: {heads} attention heads and {groups} key/value heads do not fit "
            f"hidden_size {hidden_size}; correct them"
        )
    size = hidden_size // heads if head_dim is None else head_dim
    if type(size) is not int or size % 2 or not 0 < size <= _LARGEST_SIZE:
        raise UserError(
            f"{path}: the head size {shorten(size)} is not supported; RoPE needs an even size of "
            f"at most {_LARGEST_SIZE}"
        )
    if config.get("quantization_config") is not None:
        raise UserError(f"{path}: the model is quantized; use one that is not")
    for name, expected in architecture.required.items():
        if config.get(name, expected) != expected:
            raise UserError(f"{path}: {name} is {config[name]!r}; only {expected!r} is supported")


def _windowed_layers(path: Path, config: Mapping[str, Any], architecture: Architecture) -> int:
    """Returns the number of layers with a sliding window."""
    num_layers: int = config["num_hidden_layers"]
    if architecture.window == "none":
        return 0
    if architecture.window == "always":
        return 0 if config["sliding_window"] is None else num_layers
    is_on = bool(config.get("use_sliding_window")) and config["sliding_window"] is not None
    kinds, first = config.get("layer_types"), config["max_window_layers"]
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        is_list = isinstance(kinds, list) and len(kinds) == num_layers
        if not is_list or not all(kind in known for kind in kinds):
            raise UserError(
                f"{path}: layer_types must name one of {', '.join(known)} for each of the "
                f"{num_layers} layers; other types of layers are not supported"
            )
        count: int = kinds.count("sliding_attention")
        if count and not is_on:
            raise UserError(
                f"{path}: layer_types has sliding_attention, and use_sliding_window or "
                "sliding_window is not set; correct it"
            )
        return count
    if not is_on:
        return 0
    if type(first) is not int or first < 0:
        raise UserError(f"{path}: max_window_layers must be a number of layers, not {first!r}")
    return max(0, num_layers - first)


def _window(
    path: Path, config: Mapping[str, Any], architecture: Architecture, rope: Mapping[str, Any]
) -> int | None:
    """Returns the sliding window of every layer in tokens; None if no text is longer than it."""
    count, num_layers = _windowed_layers(path, config, architecture), config["num_hidden_layers"]
    if count == 0:
        return None
    window, longest = config["sliding_window"], config["max_position_embeddings"]
    scaling = {"rope_scaling_type": None, **rope}
    longest = longest_text(SimpleNamespace(max_position_embeddings=longest, **scaling))
    if type(window) is not int or not 0 < window <= _LARGEST_SIZE:
        raise UserError(
            f"{path}: sliding_window is {shorten(window)}, not a number of tokens; correct it"
        )
    if window >= longest:
        return None
    if count < num_layers:
        raise UserError(
            f"{path}: only {count} of {num_layers} layers have a sliding window, which is not "
            "supported; use a model with use_sliding_window false"
        )
    return window
