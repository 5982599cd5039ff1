"""Published model shapes, and the conversion of rotary scaling to and from Hugging Face.

`PRESETS` maps the name of a preset to fields of the model section. A preset fills only the fields
that are unset. The functions convert between the model section's ``rope_`` fields and the
``rope_scaling`` (transformers 4) or ``rope_parameters`` (transformers 5) of a Hugging Face
config.json. The supported kinds of scaling are linear, dynamic (NTK), llama3 and YaRN.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_chatflow.config.fields import shorten
from megatron_chatflow.errors import UserError

RopeScaling = Literal["linear", "dynamic", "llama3", "yarn"]
ROPE_SCALINGS: tuple[RopeScaling, ...] = get_args(RopeScaling)
# The names of the scaling's parameters in Hugging Face and here.
_FACTORS = {
    "factor": "rope_scaling_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_max_position_embeddings",
}
_NAMES_OF_KIND = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": tuple(_FACTORS),
    "yarn": ("factor", "original_max_position_embeddings"),
}
# The parameters that only YaRN has, all of them optional.
_YARN = {
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
    "truncate": "yarn_correction_range_round_to_int",
    "attention_factor": "yarn_attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
YARN_FIELDS = tuple(_YARN.values())
YARN_DEFAULTS: dict[str, Any] = {
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_correction_range_round_to_int": True,
}
"""Values of Peng et al. 2023, "YaRN" (arXiv 2309.00071), and of transformers."""
ROPE_FIELDS = ("rope_scaling_type", *_FACTORS.values(), *YARN_FIELDS)


def is_positive_number(value: object) -> bool:
    """Returns whether a value from JSON is a number above 0 that is finite as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 < value <= sys.float_info.max


def dynamic_base(base: float, head_dim: int, factor: float, original: int, length: int) -> float:
    """Computes the rotary base of dynamic NTK scaling for a text, as transformers does.

    Up to ``original`` tokens, the length up to which the model is not scaled, it is ``base``.
    """
    stretch = factor * max(length, original) / original - (factor - 1)
    return float(base * stretch ** (head_dim / (head_dim - 2)))


def longest_text(model: Any) -> int:
    """Returns the longest text of a model section or shape in tokens.

    Dynamic scaling extends ``max_position_embeddings``. YaRN extends the original length, and some
    folders state that length as ``max_position_embeddings``.
    """
    longest: int = model.max_position_embeddings
    if model.rope_scaling_type == "dynamic":
        return int(longest * model.rope_scaling_factor)
    if model.rope_scaling_type == "yarn":
        original = model.rope_original_max_position_embeddings
        return max(longest, int(original * model.rope_scaling_factor))
    return longest


def rope_of_huggingface(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the rotary settings of a config.json to fields of the model section.

    Returns ``rotary_base``, and the ``rope_`` fields of the scaling if the model has one. The path
    is for messages.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"{path}: rope_scaling must be an object, not {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    if not is_positive_number(theta):
        raise UserError(f"{path}: rope_theta must be a positive number, not {shorten(theta)}")
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UserError(
            f"{path}: has RoPE parameters by type of layer, which is not supported; LLaMA has "
            "one type of layer"
        )
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UserError(
            f"{path}: partial_rotary_factor is {partial!r}; only 1 is supported, because LLaMA "
            "applies RoPE to whole heads"
        )
    if kind == "default":
        return {"rotary_base": float(theta)}
    if kind not in ROPE_SCALINGS:
        raise UserError(
            f"{path}: RoPE scaling of type {kind!r} is not supported; supported types are "
            f"{', '.join(ROPE_SCALINGS)}"
        )
    fallback = config.get("original_max_position_embeddings", config["max_position_embeddings"])
    given = {"original_max_position_embeddings": fallback, **rope}
    if kind in ("llama3", "yarn") and "original_max_position_embeddings" in config:
        given["original_max_position_embeddings"] = fallback  # transformers prefers it
    original: Any = given["original_max_position_embeddings"]
    if kind == "yarn" and given.get("factor") is None and is_positive_number(original):
        given["factor"] = config["max_position_embeddings"] / original
    values: dict[str, Any] = {"rotary_base": float(theta), "rope_scaling_type": kind}
    for name in _NAMES_OF_KIND[kind]:
        number: Any = given.get(name)
        if not is_positive_number(number):
            raise UserError(
                f"{path}: RoPE scaling of type {kind!r} needs a positive {name}, not "
                f"{shorten(number)}"
            )
        is_length = name == "original_max_position_embeddings"
        values[_FACTORS[name]] = int(number) if is_length else float(number)
    if kind == "llama3" and values["rope_low_freq_factor"] >= values["rope_high_freq_factor"]:
        raise UserError(f"{path}: low_freq_factor must be below high_freq_factor")
    if kind == "yarn":
        values |= _yarn_of_huggingface(path, given)
    return values


def _yarn_of_huggingface(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the parameters that only YaRN has; transformers' defaults replace unset ones."""
    values = dict(YARN_DEFAULTS)
    for name, field in _YARN.items():
        value = given.get(name)
        if name == "truncate":
            if name in given and not isinstance(value, bool):
                raise UserError(f"{path}: truncate must be true or false, not {shorten(value)}")
            values[field] = given.get(name, True)
        elif value is not None and (value != 0 or name == "attention_factor"):
            if not is_positive_number(value):
                raise UserError(f"{path}: {name} must be a positive number, not {shorten(value)}")
            values[field] = float(value)
    if values["yarn_beta_fast"] < values["yarn_beta_slow"]:
        raise UserError(f"{path}: beta_fast must not be below beta_slow")
    return values


def huggingface_rope(model: Any) -> dict[str, Any] | None:
    """Returns the ``rope_scaling`` of a model section or shape, or None if it has no scaling."""
    kind = model.rope_scaling_type
    if kind is None:
        return None
    numbers = {name: getattr(model, _FACTORS[name]) for name in _NAMES_OF_KIND[kind]}
    if kind == "yarn":
        # Unset parameters are left out, and so is truncate, which older readers do not know.
        given = {name: getattr(model, field) for name, field in _YARN.items()}
        numbers |= {
            k: value for k, value in given.items() if value is not None and value is not True
        }
    return {"rope_type": kind, **numbers}


# Touvron et al. 2023, "Llama 2" (arXiv 2307.09288), and the released parameter files.
PRESETS: dict[str, dict[str, Any]] = {
    "llama2-7b": {
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 11008,
        "num_attention_heads": 32,
        "num_query_groups": 32,
        "max_position_embeddings": 4096,
    },
    "llama2-13b": {
        "num_layers": 40,
        "hidden_size": 5120,
        "ffn_hidden_size": 13824,
        "num_attention_heads": 40,
        "num_query_groups": 40,
        "max_position_embeddings": 4096,
    },
    "llama2-70b": {
        "num_layers": 80,
        "hidden_size": 8192,
        "ffn_hidden_size": 28672,
        "num_attention_heads": 64,
        "num_query_groups": 8,
        "max_position_embeddings": 4096,
    },
    # Small enough for a CPU. It has grouped queries to cover the code paths of the large models.
    "tiny": {
        "num_layers": 4,
        "hidden_size": 256,
        "ffn_hidden_size": 688,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "max_position_embeddings": 2048,
    },
}
