"""Converts the config.json of a Hugging Face LLaMA to a model section.

A Mistral without a sliding window is supported as well, because its tensors have the same names and
the same function as those of a LLaMA.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_chatflow.config.architectures import is_positive_number, rope_of_huggingface
from megatron_chatflow.config.fields import MAX_LAYERS, shorten
from megatron_chatflow.errors import UserError

# The names of the fields in Hugging Face's LlamaConfig and here.
CONFIG_NAMES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "norm_epsilon",
    "initializer_range": "init_method_std",
}
_LARGEST_SIZE = 2**31 - 1
# The architecture of each model_type, and the defaults of fields that a config.json may omit.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
_CONFIG_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "initializer_range": 0.02},
    "mistral": {
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}


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

    The ``rope_`` fields are present only if the model has rotary scaling, and ``kv_channels`` only
    if the sizes of the heads do not add up to the hidden size.

    Raises:
        UserError: If config.json is invalid, or the model is not a LLaMA or has unsupported parts.
    """
    path = folder / "config.json"
    config = read_huggingface_config(folder)
    kind = config.get("model_type")
    named = config.get("architectures") or kind
    architecture = named[0] if isinstance(named, list) else named
    if kind not in tuple(ARCHITECTURES) or architecture not in (kind, ARCHITECTURES[kind]):
        raise UserError(
            f"{path}: architecture {architecture} is not supported; use LlamaForCausalLM, or "
            "MistralForCausalLM without a sliding window"
        )
    config = {**_CONFIG_DEFAULTS[kind], **config}
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
    _refuse_variants(path, config)
    rope = rope_of_huggingface(path, config)
    if kind == "mistral":
        _refuse_window(path, config, rope)
    head_dim = config.get("head_dim")
    if head_dim is not None and head_dim * config["num_attention_heads"] != config["hidden_size"]:
        rope["kv_channels"] = head_dim
    return {
        **{ours: config[theirs] for theirs, ours in CONFIG_NAMES.items()},
        **rope,
        "norm_epsilon": float(config["rms_norm_eps"]),
        "init_method_std": float(config["initializer_range"]),
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
    }


def _refuse_variants(path: Path, config: Mapping[str, Any]) -> None:
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
    for name, expected in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if config.get(name, expected) != expected:
            raise UserError(f"{path}: {name} is {config[name]!r}; only {expected!r} is supported")


def _refuse_window(path: Path, config: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    """Rejects a Mistral with a sliding window that is shorter than its longest text."""
    window, longest = config["sliding_window"], config["max_position_embeddings"]
    if rope.get("rope_scaling_type") == "dynamic":  # the stated length is that before scaling
        longest *= rope["rope_scaling_factor"]
    if window is None or (is_positive_number(window) and window >= longest):
        return
    raise UserError(
        f"{path}: sliding_window is {shorten(window)}, but LLaMA's attention has no window; use "
        "a Mistral model whose sliding_window is null, or lower max_position_embeddings in this "
        "file to the window, up to which both models are equal"
    )
