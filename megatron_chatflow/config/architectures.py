"""The supported architectures, the sizes of published models, and rotary scaling, as data.

`ARCHITECTURES` is the only place that knows what tells one family of models from another: the
names that Hugging Face gives it, what its config.json leaves out, and which of megatron-core's
switches it sets. The tensors that a switch adds are in ``RULES`` and ``axis_size`` of
`convert.weight_map`. A dense decoder with RMSNorm, SwiGLU and rotary positions and without other
tensors is added by one entry here and one in ``tools/check_architectures.py``, which compares it
with transformers at every layout.

`PRESETS` maps the name of a preset to fields of the model section. A preset fills only the fields
that are unset. The functions convert between the model section's ``rope_`` fields and the
``rope_scaling`` (transformers 4) or ``rope_parameters`` (transformers 5) of a Hugging Face
config.json. The supported kinds of scaling are linear, dynamic (NTK), llama3 and YaRN.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
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
NULLABLE_FIELDS = ("window_size", "rope_scaling_type")
"""Fields in which an explicit null means "without" and is not replaced by a preset's value."""


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
        original: int = model.rope_original_max_position_embeddings
        return max(longest, int(original * model.rope_scaling_factor))
    return longest


def without_other_rope(preset: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a preset's fields without its rotary scaling if another type of scaling is given."""
    own = preset.get("rope_scaling_type")
    if given.get("rope_scaling_type", own) == own:
        return dict(preset)
    return {name: value for name, value in preset.items() if name not in ROPE_FIELDS}


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
            f"{path}: has RoPE parameters by type of layer, which is not supported; the "
            "supported models have one type of layer"
        )
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UserError(
            f"{path}: partial_rotary_factor is {partial!r}; only 1 is supported, because "
            "RoPE is applied to whole heads"
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
    if not {"mscale", "mscale_all_dim"} <= values.keys():  # transformers ignores one without other
        values = {k: value for k, value in values.items() if k not in ("mscale", "mscale_all_dim")}
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


@dataclass(frozen=True)
class Architecture:
    """A family of models.

    Attributes:
        model_type: Its name in config.json.
        class_name: Its class in transformers, which config.json lists as ``architectures``.
        defaults: Fields that a config.json may omit, with transformers' values where they are not
            those of `DEFAULTS`.
        required: Fields that change the function of the model, with the only supported value.
        extra: Fields that are written to a config.json and that change nothing.
        add_qkv_bias: Whether queries, keys and values have a bias.
        qk_layernorm: Whether the queries and the keys of each head have an RMSNorm.
        window: How config.json states a sliding window. ``always``: ``sliding_window`` is the
            window of every layer. ``switched``: it is that of the layers in ``layer_types``, or
            from ``max_window_layers`` on if ``use_sliding_window`` is set. ``none``: there is none.
    """

    model_type: str
    class_name: str
    defaults: Mapping[str, Any]
    required: Mapping[str, Any]
    extra: Mapping[str, Any]
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    window: Literal["none", "always", "switched"] = "none"

    def fits(self, model: Any) -> bool:
        """Returns whether a model section or shape has the layers of this architecture."""
        switches = (model.add_qkv_bias, model.qk_layernorm)
        has_window = model.window_size is None or self.window != "none"
        return has_window and switches == (self.add_qkv_bias, self.qk_layernorm)

    def window_fields(self, window: int | None, num_layers: int) -> dict[str, Any]:
        """Returns the fields of config.json for a sliding window in every layer, or for none."""
        if self.window == "none":
            return {}
        if self.window == "always":
            return {"sliding_window": window}
        # transformers reads layer_types, and versions before 4.53 only max_window_layers.
        kind = "full_attention" if window is None else "sliding_attention"
        return {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": num_layers if window is None else 0,
            "layer_types": [kind] * num_layers,
        }


# The names of fields in config.json and in the model section, the same in every architecture.
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
DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "initializer_range": 0.02}

# Defaults are those of the classes ``LlamaConfig``, ``MistralConfig``, ``Qwen2Config`` and
# ``Qwen3Config`` of transformers 5.24.
ARCHITECTURES: dict[str, Architecture] = {
    each.model_type: each
    for each in (
        Architecture(
            "llama",
            "LlamaForCausalLM",
            defaults={"max_position_embeddings": 2048},
            required={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
            extra={"attention_dropout": 0.0, "pretraining_tp": 1},
        ),
        Architecture(
            "mistral",
            "MistralForCausalLM",
            defaults={
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "sliding_window": 4096,
            },
            required={"hidden_act": "silu"},
            extra={"attention_dropout": 0.0},
            window="always",
        ),
        Architecture(
            "qwen2",
            "Qwen2ForCausalLM",
            defaults={
                "max_position_embeddings": 32768,
                "num_key_value_heads": 32,
                "sliding_window": 4096,
                "max_window_layers": 28,
            },
            required={"hidden_act": "silu"},
            extra={"attention_dropout": 0.0},
            add_qkv_bias=True,
            window="switched",
        ),
        Architecture(
            "qwen3",
            "Qwen3ForCausalLM",
            defaults={
                "max_position_embeddings": 32768,
                "num_key_value_heads": 32,
                "head_dim": 128,
                "sliding_window": 4096,
                "max_window_layers": 28,
            },
            required={"hidden_act": "silu", "attention_bias": False},
            extra={"attention_dropout": 0.0},
            qk_layernorm=True,
            window="switched",
        ),
    )
}


def supported_classes() -> str:
    """Returns the names of the supported classes of transformers, for messages."""
    return ", ".join(each.class_name for each in ARCHITECTURES.values())


def architecture_of(model: Any) -> Architecture:
    """Returns the architecture of a model section or shape, the first one whose layers it has.

    Raises:
        UserError: No supported architecture has these layers.
    """
    found = next((each for each in ARCHITECTURES.values() if each.fits(model)), None)
    if found is None:
        raise UserError(
            "model.add_qkv_bias and model.qk_layernorm: both are set, and no supported "
            f"architecture ({supported_classes()}) has both; remove one of them"
        )
    return found


def _sizes(
    layers: int, hidden: int, ffn: int, heads: int, groups: int, longest: int, **others: Any
) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "max_position_embeddings": longest,
        **others,
    }


def _llama3(factor: float) -> dict[str, Any]:
    return {
        "rotary_base": 500000.0,
        "rope_scaling_type": "llama3",
        "rope_scaling_factor": factor,
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0,
        "rope_original_max_position_embeddings": 8192,
    }


_TIED = {"untie_embeddings_and_output_weights": False}
_QWEN2 = {"add_qkv_bias": True, "rotary_base": 1e6, "norm_epsilon": 1e-6}
_QWEN2_LARGE = {**_QWEN2, "norm_epsilon": 1e-5}  # of the base models with 14B and more
_QWEN3 = {"qk_layernorm": True, "rotary_base": 1e6, "norm_epsilon": 1e-6}
_NARROW = {**_QWEN3, "kv_channels": 128}  # 128 is not hidden_size / num_attention_heads

# The figures are those of config.json in the repositories that the authors published on Hugging
# Face: meta-llama/*, mistralai/*, Qwen/* (base models, except that the context of Qwen3 is that of
# the models after post-training). LLaMA 2 also in Touvron et al. 2023, "Llama 2" (arXiv
# 2307.09288), Qwen2.5 in Yang et al. 2024, table 1 (arXiv 2412.15115), Qwen3 in Yang et al. 2025,
# table 1 (arXiv 2505.09388).
PRESETS: dict[str, dict[str, Any]] = {
    "llama2-7b": _sizes(32, 4096, 11008, 32, 32, 4096),
    "llama2-13b": _sizes(40, 5120, 13824, 40, 40, 4096),
    "llama2-70b": _sizes(80, 8192, 28672, 64, 8, 4096),
    "llama3-8b": _sizes(32, 4096, 14336, 32, 8, 8192, rotary_base=500000.0),
    "llama3.1-8b": _sizes(32, 4096, 14336, 32, 8, 131072, **_llama3(8.0)),
    "llama3.1-70b": _sizes(80, 8192, 28672, 64, 8, 131072, **_llama3(8.0)),
    "llama3.2-1b": _sizes(16, 2048, 8192, 32, 8, 131072, **_llama3(32.0), **_TIED),
    "llama3.2-3b": _sizes(28, 3072, 8192, 24, 8, 131072, **_llama3(32.0), **_TIED),
    "qwen2-0.5b": _sizes(24, 896, 4864, 14, 2, 131072, **_QWEN2, **_TIED),
    "qwen2-1.5b": _sizes(28, 1536, 8960, 12, 2, 131072, **_QWEN2, **_TIED),
    "qwen2-7b": _sizes(28, 3584, 18944, 28, 4, 131072, **_QWEN2),
    "qwen2-72b": _sizes(80, 8192, 29568, 64, 8, 131072, **_QWEN2_LARGE),
    "qwen2.5-0.5b": _sizes(24, 896, 4864, 14, 2, 32768, **_QWEN2, **_TIED),
    "qwen2.5-1.5b": _sizes(28, 1536, 8960, 12, 2, 131072, **_QWEN2, **_TIED),
    "qwen2.5-3b": _sizes(36, 2048, 11008, 16, 2, 32768, **_QWEN2, **_TIED),
    "qwen2.5-7b": _sizes(28, 3584, 18944, 28, 4, 131072, **_QWEN2),
    "qwen2.5-14b": _sizes(48, 5120, 13824, 40, 8, 131072, **_QWEN2_LARGE),
    "qwen2.5-32b": _sizes(64, 5120, 27648, 40, 8, 131072, **_QWEN2_LARGE),
    "qwen2.5-72b": _sizes(80, 8192, 29568, 64, 8, 131072, **_QWEN2_LARGE),
    "qwen3-0.6b": _sizes(28, 1024, 3072, 16, 8, 40960, **_NARROW, **_TIED),
    "qwen3-1.7b": _sizes(28, 2048, 6144, 16, 8, 40960, **_QWEN3, **_TIED),
    "qwen3-4b": _sizes(36, 2560, 9728, 32, 8, 40960, **_NARROW, **_TIED),
    "qwen3-8b": _sizes(36, 4096, 12288, 32, 8, 40960, **_QWEN3),
    "qwen3-14b": _sizes(40, 5120, 17408, 40, 8, 40960, **_QWEN3),
    "qwen3-32b": _sizes(64, 5120, 25600, 64, 8, 40960, **_NARROW),
    "mistral-7b-v0.1": _sizes(32, 4096, 14336, 32, 8, 32768, window_size=(4095, 0)),
    "mistral-7b-v0.3": _sizes(32, 4096, 14336, 32, 8, 32768, rotary_base=1e6),
    # Small enough for a CPU. It has grouped queries to cover the code paths of the large models.
    "tiny": _sizes(4, 256, 688, 8, 4, 2048),
}
