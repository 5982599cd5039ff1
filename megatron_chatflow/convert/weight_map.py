"""The correspondence between megatron-core's and Hugging Face's tensors, for both directions.

Every value is moved and none is computed, so that a round trip is exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from megatron_chatflow.convert.safetensors import HuggingFaceWeights
from megatron_chatflow.convert.shape import LlamaShape
from megatron_chatflow.errors import UserError


class Join(Enum):
    """How Hugging Face tensors are joined to a megatron-core tensor."""

    SAME = "the only tensor"
    ROWS = "concatenated along rows: gate, then up"
    QUERY_GROUPS = "group by group: its query heads, its key head, its value head"


@dataclass(frozen=True)
class HuggingFaceTensor:
    """A tensor of a model of transformers."""

    name: str  # the name, with ``{layer}`` if there is one for each layer
    axes: tuple[str, ...]  # names of the axes, see `axis_size`

    def shape(self, model: LlamaShape) -> tuple[int, ...]:
        """Returns the tensor's shape in a model."""
        return tuple(axis_size(axis, model) for axis in self.axes)


@dataclass(frozen=True)
class WeightRule:
    """A megatron-core tensor and the Hugging Face tensors it consists of."""

    megatron: str  # its name, with ``{layer}`` if there is one for each layer
    # the Hugging Face tensors in the order in which they are joined
    parts: tuple[HuggingFaceTensor, ...]
    join: Join = Join.SAME  # how they are joined
    needs: str | None = None  # the field of `LlamaShape` that a model with the tensor has set

    @property
    def is_per_layer(self) -> bool:
        """Whether there is one for each layer."""
        return "{layer}" in self.megatron

    @property
    def has_vocabulary_rows(self) -> bool:
        """Whether there is one row for each vocabulary entry, so that rows may be padded."""
        return self.parts[0].axes[0] == "vocabulary"

    def shape(self, model: LlamaShape) -> tuple[int, ...]:
        """Returns the shape of the megatron-core tensor, without padding rows."""
        rows = sum(part.shape(model)[0] for part in self.parts)
        return (rows, *self.parts[0].shape(model)[1:])


def _layer(name: str, *axes: str, kind: str = "weight") -> HuggingFaceTensor:
    return HuggingFaceTensor(f"model.layers.{{layer}}.{name}.{kind}", axes)


RULES: tuple[WeightRule, ...] = (
    WeightRule(
        "embedding.word_embeddings.weight",
        (HuggingFaceTensor("model.embed_tokens.weight", ("vocabulary", "hidden")),),
    ),
    WeightRule(
        "decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight",
        (_layer("input_layernorm", "hidden"),),
    ),
    WeightRule(
        "decoder.layers.{layer}.self_attention.linear_qkv.weight",
        (
            _layer("self_attn.q_proj", "queries", "hidden"),
            _layer("self_attn.k_proj", "keys", "hidden"),
            _layer("self_attn.v_proj", "keys", "hidden"),
        ),
        Join.QUERY_GROUPS,
    ),
    WeightRule(
        "decoder.layers.{layer}.self_attention.linear_qkv.bias",
        (
            _layer("self_attn.q_proj", "queries", kind="bias"),
            _layer("self_attn.k_proj", "keys", kind="bias"),
            _layer("self_attn.v_proj", "keys", kind="bias"),
        ),
        Join.QUERY_GROUPS,
        needs="add_qkv_bias",
    ),
    WeightRule(
        "decoder.layers.{layer}.self_attention.q_layernorm.weight",
        (_layer("self_attn.q_norm", "head"),),
        needs="qk_layernorm",
    ),
    WeightRule(
        "decoder.layers.{layer}.self_attention.k_layernorm.weight",
        (_layer("self_attn.k_norm", "head"),),
        needs="qk_layernorm",
    ),
    WeightRule(
        "decoder.layers.{layer}.self_attention.linear_proj.weight",
        (_layer("self_attn.o_proj", "hidden", "queries"),),
    ),
    WeightRule(
        "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight",
        (_layer("post_attention_layernorm", "hidden"),),
    ),
    WeightRule(
        "decoder.layers.{layer}.mlp.linear_fc1.weight",
        (_layer("mlp.gate_proj", "ffn", "hidden"), _layer("mlp.up_proj", "ffn", "hidden")),
        Join.ROWS,
    ),
    WeightRule(
        "decoder.layers.{layer}.mlp.linear_fc2.weight", (_layer("mlp.down_proj", "hidden", "ffn"),)
    ),
    WeightRule(
        "decoder.final_layernorm.weight", (HuggingFaceTensor("model.norm.weight", ("hidden",)),)
    ),
    WeightRule(
        "output_layer.weight",
        (HuggingFaceTensor("lm_head.weight", ("vocabulary", "hidden")),),
        needs="untie_embeddings_and_output_weights",
    ),
)


def axis_size(axis: str, model: LlamaShape) -> int:
    """Returns the length of a named axis."""
    sizes = {
        "vocabulary": model.vocab_size,
        "hidden": model.hidden_size,
        "head": model.head_dim,
        "ffn": model.ffn_hidden_size,
        "queries": model.num_attention_heads * model.head_dim,
        "keys": model.num_query_groups * model.head_dim,
    }
    return sizes[axis]


def rules_of(model: LlamaShape) -> tuple[WeightRule, ...]:
    """Returns the rules of a model; with tied embeddings there is no output layer."""
    return tuple(rule for rule in RULES if rule.needs is None or getattr(model, rule.needs))


def placements(model: LlamaShape) -> list[tuple[WeightRule, int | None]]:
    """Returns (rule, layer) of every megatron-core tensor, from the embedding to the output."""
    rules = rules_of(model)
    first = next(i for i, rule in enumerate(rules) if rule.is_per_layer)
    per_layer = [rule for rule in rules if rule.is_per_layer]
    before: list[tuple[WeightRule, int | None]] = [(rule, None) for rule in rules[:first]]
    layers = [(rule, layer) for layer in range(model.num_layers) for rule in per_layer]
    after = [(rule, None) for rule in rules[first:] if not rule.is_per_layer]
    return [*before, *layers, *after]


def huggingface_shapes(model: LlamaShape) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of every Hugging Face tensor of a model."""
    return {
        part.name.format(layer=layer): part.shape(model)
        for rule, layer in placements(model)
        for part in rule.parts
    }


def join(rule: WeightRule, model: LlamaShape, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Joins Hugging Face tensors, in the rule's order, to the megatron-core tensor."""
    if rule.join is Join.SAME:
        return parts[0]
    if rule.join is Join.ROWS:
        return torch.cat(list(parts))
    groups = model.num_query_groups
    cut = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(cut, dim=1).flatten(0, 1)


def segments(rule: WeightRule, model: LlamaShape) -> list[tuple[int, int, int]]:
    """Returns the rows of Hugging Face tensors that make up a megatron-core tensor.

    Returns:
        ``(index of the part, its first row, number of rows)``, from top to bottom.
    """
    rows = [part.shape(model)[0] for part in rule.parts]
    if rule.join is not Join.QUERY_GROUPS:
        return [(number, 0, count) for number, count in enumerate(rows)]
    groups = model.num_query_groups
    return [
        (number, group * (count // groups), count // groups)
        for group in range(groups)
        for number, count in enumerate(rows)
    ]


def split(rule: WeightRule, model: LlamaShape, whole: torch.Tensor) -> list[torch.Tensor]:
    """Splits a megatron-core tensor into contiguous Hugging Face tensors; the inverse of `join`."""
    rows = [part.shape(model)[0] for part in rule.parts]
    if rule.join is not Join.QUERY_GROUPS:
        return [part.contiguous() for part in torch.split(whole, rows)]
    groups = model.num_query_groups
    by_group = whole.reshape(groups, -1, *whole.shape[1:])
    cut = torch.split(by_group, [count // groups for count in rows], dim=1)
    return [part.flatten(0, 1).contiguous() for part in cut]


# Buffers that older versions of transformers stored and that follow from the configuration.
_DERIVED_SUFFIXES = (".rotary_emb.inv_freq",)
_TIED = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"


def check_weights(weights: HuggingFaceWeights, shape: LlamaShape) -> None:
    """Checks that a folder holds exactly the tensors that its config.json describes."""
    expected = huggingface_shapes(shape)
    missing = [name for name in expected if name not in weights.files]
    if missing:
        raise UserError(
            f"{weights.folder}: {len(missing)} tensors are missing, the first is {missing[0]}"
        )
    for name, size in expected.items():
        weights.dtype(name)  # refuses quantized tensors
        if weights.shape(name) != size:
            raise UserError(
                f"{weights.files[name]}: {name} has shape {list(weights.shape(name))}, but "
                f"{list(size)} according to config.json; the two files belong to different models"
            )
    for name in weights.files:
        if name in expected or name.endswith(_DERIVED_SUFFIXES):
            continue
        if name == _TIED and _is_embedding(weights, name):
            continue  # tied, but stored nevertheless
        raise UserError(
            f"{weights.files[name]}: {name} is not a tensor of the model that config.json describes"
        )


def _is_embedding(weights: HuggingFaceWeights, name: str) -> bool:
    """Returns whether a tensor equals the embedding; refuses quantized tensors."""
    is_alike = weights.dtype(name) == weights.dtype(_EMBEDDING) and (
        weights.shape(name) == weights.shape(_EMBEDDING)
    )
    return is_alike and torch.equal(weights.read(name), weights.read(_EMBEDDING))
