"""A LLaMA's shape, as a checkpoint's state and as Hugging Face's config.json state it.

In: `state.json` and `config.yaml` of a checkpoint, or `config.json` of a Hugging Face folder. Out:
a `LlamaShape`, and the other side's form of it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_chatflow.checkpoint.files import read_state
from megatron_chatflow.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TORCH_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

# Names of Hugging Face's LlamaConfig, and ours.
_CONFIG_NAMES = {
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
# LlamaConfig's own defaults, which a config.json may leave out.
_CONFIG_DEFAULTS = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
}


@dataclass(frozen=True)
class LlamaShape:
    """What tensors a LLaMA has and how they are used; the names are `ModelConfig`'s."""

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

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.hidden_size // self.num_attention_heads


def shape_of_checkpoint(checkpoint: Path) -> LlamaShape:
    """Reads a checkpoint's model shape.

    Args:
        checkpoint: An ``iter_`` folder.

    Raises:
        UserError: `state.json` is missing, or lacks a part of the shape.
    """
    model = read_state(checkpoint).get("model", {})
    configured = read_run_config(checkpoint).get("model") or {}
    values = {
        # These two do not change the tensors and so are the configuration's alone.
        "max_position_embeddings": configured.get("max_position_embeddings", 4096),
        "init_method_std": configured.get("init_method_std", 0.02),
        **model,
    }
    missing = [name for name in LlamaShape.__dataclass_fields__ if values.get(name) is None]
    if missing:
        raise UserError(
            f"{checkpoint / 'state.json'}: model.{missing[0]} is missing; "
            "the checkpoint is of another version"
        )
    return LlamaShape(**{name: values[name] for name in LlamaShape.__dataclass_fields__})


def read_run_config(checkpoint: Path) -> dict[str, Any]:
    """The configuration beside a checkpoint's weights, {} where there is none."""
    path = checkpoint / "config.yaml"
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{path}: is not YAML; restore it or move it away") from None
    return config if isinstance(config, dict) else {}


def read_huggingface_config(folder: Path) -> dict[str, Any]:
    """Reads config.json of a Hugging Face folder.

    Raises:
        UserError: There is none, or it is no JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: has no config.json; name a Hugging Face model folder") from None
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error}); fetch the folder again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: is damaged (no object); fetch the folder again")
    return config


def shape_of_huggingface(folder: Path) -> LlamaShape:
    """Reads a Hugging Face folder's model shape.

    Raises:
        UserError: It is no LLaMA, or one with parts that this model does not have.
    """
    path = folder / "config.json"
    config = {**_CONFIG_DEFAULTS, **read_huggingface_config(folder)}
    architecture = (config.get("architectures") or [config.get("model_type")])[0]
    if config.get("model_type") != "llama" or architecture not in ("LlamaForCausalLM", "llama"):
        raise UserError(
            f"{path}: {architecture} is not a LLaMA; only LlamaForCausalLM is converted"
        )
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = config.get("num_attention_heads")
    for name in _CONFIG_NAMES:
        if not isinstance(config.get(name), (int, float)) or config[name] <= 0:
            raise UserError(f"{path}: {name} is missing or not a positive number; complete it")
    _refuse_variants(path, config)
    rope = config.get("rope_parameters") or {}
    return LlamaShape(
        **{ours: config[theirs] for theirs, ours in _CONFIG_NAMES.items()},
        rotary_base=float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        untie_embeddings_and_output_weights=not config.get("tie_word_embeddings", False),
    )


def _refuse_variants(path: Path, config: Mapping[str, Any]) -> None:
    """Refuses what would load and then compute something else."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    if head_dim * heads != config["hidden_size"] or heads % groups:
        raise UserError(
            f"{path}: {heads} heads of {head_dim}, {groups} of them with keys, do not make up "
            f"hidden_size {config['hidden_size']}; such a model cannot be converted"
        )
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type != "default":
        raise UserError(
            f"{path}: rotary scaling of type {rope_type!r}; the model has none, so only folders "
            "without it are converted"
        )
    for name, expected in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
    ):
        if config.get(name, expected) != expected:
            raise UserError(f"{path}: {name} is {config[name]!r}; LLaMA has {expected!r}")


def huggingface_config(
    shape: LlamaShape, dtype: torch.dtype, special_ids: Mapping[str, int | None]
) -> dict[str, Any]:
    """The config.json of a model.

    Args:
        shape: The model's shape.
        dtype: Of the exported weights.
        special_ids: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``.
    """
    theirs = {theirs: getattr(shape, ours) for theirs, ours in _CONFIG_NAMES.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **theirs,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rope_theta": shape.rotary_base,
        "rope_scaling": None,
        "tie_word_embeddings": not shape.untie_embeddings_and_output_weights,
        **special_ids,
        "torch_dtype": TORCH_NAMES[dtype],
        "use_cache": True,
    }
