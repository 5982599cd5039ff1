"""The shape of a model, as recorded in checkpoints and in Hugging Face's ``config.json``."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from megatron_chatflow.checkpoint.files import read_state
from megatron_chatflow.checkpoint.recorded_config import read_run_config
from megatron_chatflow.config import ModelConfig
from megatron_chatflow.config.architectures import (
    CONFIG_NAMES,
    YARN_FIELDS,
    Architecture,
    RopeScaling,
    architecture_of,
    dynamic_base,
    huggingface_rope,
    longest_text,
)
from megatron_chatflow.config.huggingface import model_of_config, model_of_huggingface
from megatron_chatflow.config.problems import describe
from megatron_chatflow.config.validation import check_model
from megatron_chatflow.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TORCH_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class LlamaShape:
    """The shape of a model of any supported architecture, and settings that change its output.

    The names are those of `ModelConfig`.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int
    max_position_embeddings: int
    rotary_base: float
    norm_epsilon: float
    init_method_std: float
    untie_embeddings_and_output_weights: bool
    rope_scaling_type: RopeScaling | None = None
    rope_scaling_factor: float | None = None
    rope_low_freq_factor: float | None = None
    rope_high_freq_factor: float | None = None
    rope_original_max_position_embeddings: int | None = None
    kv_channels: int | None = None
    yarn_beta_fast: float | None = None
    yarn_beta_slow: float | None = None
    yarn_correction_range_round_to_int: bool | None = None
    yarn_attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    window_size: tuple[int, int] | None = None
    add_qkv_bias: bool = False
    qk_layernorm: bool = False

    @classmethod
    def of(cls, model: ModelConfig, vocab_size: int) -> "LlamaShape":
        """Returns the shape of a configuration with a vocabulary of ``vocab_size``."""
        values = {field.name: getattr(model, field.name) for field in fields(cls)}
        return cls(**{**values, "vocab_size": vocab_size})

    def recorded(self) -> dict[str, Any]:
        """Returns what a checkpoint's state records: all that changes the model's output."""
        left_out = {"init_method_std"}
        if self.rope_scaling_type != "dynamic":  # the only kind that depends on it
            left_out.add("max_position_embeddings")
        if self.rope_scaling_type is None:
            left_out |= {field.name for field in fields(self) if field.name.startswith("rope_")}
        # Absent from the states of versions that had only the default.
        later = ("kv_channels", *YARN_FIELDS, "window_size", "add_qkv_bias", "qk_layernorm")
        left_out |= {name for name in later if getattr(self, name) == _DEFAULTS[name]}
        values = {name: value for name, value in asdict(self).items() if name not in left_out}
        if self.window_size is not None:
            values["window_size"] = list(self.window_size)  # as JSON returns it
        return values

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def window(self) -> int | None:
        """Number of tokens that a token sees with its window, itself included; None for all."""
        return None if self.window_size is None else self.window_size[0] + 1

    @property
    def longest(self) -> int:
        """The longest text in tokens, including the extension by rotary scaling."""
        return longest_text(self)

    def trained_at(self, length: int) -> "LlamaShape":
        """Returns the shape after training on samples of ``length`` tokens.

        Under dynamic rotary scaling, training uses the base of its own sequence length for all
        texts. Beyond the original length this is another model, which is described by the new base
        without scaling.
        """
        if self.rope_scaling_type != "dynamic" or length <= self.max_position_embeddings:
            return self
        factor, original = self.rope_scaling_factor or 1.0, self.max_position_embeddings
        return replace(
            self,
            rotary_base=dynamic_base(self.rotary_base, self.head_dim, factor, original, length),
            max_position_embeddings=length,
            rope_scaling_type=None,
            rope_scaling_factor=None,
        )


def shape_of_checkpoint(checkpoint: Path) -> LlamaShape:
    """Reads the model shape of an ``iter_`` folder."""
    path = checkpoint / "state.json"
    recorded = read_state(checkpoint).get("model")
    if not isinstance(recorded, Mapping):
        raise UserError(f"{path}: model is missing or not an object; load another checkpoint")
    # Settings that do not change the tensors are only in the configuration.
    values = {**asdict(read_run_config(checkpoint).model), **recorded}
    known: dict[str, Any] = {
        field.name: values.get(field.name, _DEFAULTS.get(field.name)) for field in _FIELDS
    }
    missing = [name for name, value in known.items() if value is None and name not in _DEFAULTS]
    if missing:
        raise UserError(
            f"{path}: model.{missing[0]} is missing; the checkpoint was written by an "
            "incompatible version"
        )
    try:
        model = _adapter.validate_python(known)
        check_model(model)
    except ValidationError as error:
        reason = f"model.{describe(error, ModelConfig)}"
    except UserError as error:
        reason = str(error)
    else:
        return LlamaShape.of(model, known["vocab_size"])
    raise UserError(f"{path}: {reason}; load another checkpoint")


def trained_shape(checkpoint: Path) -> LlamaShape:
    """Reads a checkpoint's model shape for export, see `LlamaShape.trained_at`."""
    length = read_run_config(checkpoint).data.seq_length
    shape = shape_of_checkpoint(checkpoint)
    return shape if length is None else shape.trained_at(length)


def shape_of_huggingface(folder: Path) -> LlamaShape:
    """Reads a Hugging Face folder's model shape."""
    return LlamaShape(**model_of_huggingface(folder))


def shape_of_config(path: Path, config: Mapping[str, Any]) -> LlamaShape:
    """Returns the shape that the content of a config.json describes; the path is for messages."""
    return LlamaShape(**model_of_config(path, config))


def check_transformers(version: str, shape: LlamaShape) -> None:
    """Checks that a version of transformers computes a model's YaRN and sliding window.

    Versions before 4.53 apply a window of Qwen to no layer or to all, those before 4.51 ignore the
    original length of YaRN, and some later ones ``truncate``.

    Raises:
        UserError: The model has one of them, and the version is before 4.57.
    """
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    if numbers >= (4, 57):
        return
    for part, has_it in (
        ("YaRN", shape.rope_scaling_type == "yarn"),
        ("a sliding window", shape.window is not None),
    ):
        if has_it:
            raise UserError(
                f"transformers: version {version} may compute {part} differently; run pip install "
                "'transformers>=4.57.1'"
            )


def huggingface_config(
    shape: LlamaShape,
    dtype: torch.dtype,
    special_ids: Mapping[str, int | None],
    architecture: Architecture | None = None,
) -> dict[str, Any]:
    """Returns the content of a model's config.json.

    With YaRN, ``max_position_embeddings`` is the extended length: transformers 4.51 to 4.53 replace
    the factor by ``max_position_embeddings / original_max_position_embeddings``.

    Args:
        shape: The model's shape.
        dtype: The dtype of the stored weights.
        special_ids: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``.
        architecture: The architecture to name, if several have the model's layers.
    """
    architecture = architecture or architecture_of(shape)
    theirs = {theirs: getattr(shape, ours) for theirs, ours in CONFIG_NAMES.items()}
    if shape.rope_scaling_type == "yarn":
        theirs["max_position_embeddings"] = shape.longest
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        **theirs,
        "head_dim": shape.head_dim,
        **architecture.required,
        **architecture.extra,
        **architecture.window_fields(shape.window, shape.num_layers),
        "rope_theta": shape.rotary_base,
        "rope_scaling": huggingface_rope(shape),
        "tie_word_embeddings": not shape.untie_embeddings_and_output_weights,
        **special_ids,
        "torch_dtype": TORCH_NAMES[dtype],
        "use_cache": True,
    }


_FIELDS = fields(LlamaShape)
_DEFAULTS = {field.name: field.default for field in _FIELDS if field.default is not MISSING}
_adapter = TypeAdapter(ModelConfig)
