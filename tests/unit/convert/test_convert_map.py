"""Tests the weight map on plain tensors, and the tensor names that checkpoints may use."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_shape
import torch

from megatron_chatflow.convert.distributed import ChunkToWrite, DistributedReader, write_distributed
from megatron_chatflow.convert.safetensors import SafetensorsFile, plan_shards, write_shards
from megatron_chatflow.convert.weight_map import (
    RULES,
    Join,
    huggingface_shapes,
    join,
    placements,
    rules_of,
    segments,
    split,
)

SHAPE = replace(
    tiny_shape.SHAPE,
    num_layers=3,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=6,
    vocab_size=11,
)
MATRICES = {rule.megatron.split(".")[-2]: rule for rule in RULES if rule.parts[0].axes[1:]}


def rows(count: int, first: int) -> torch.Tensor:
    """Returns float32[count, 24], where row i is filled with first + i."""
    return (torch.arange(count) + first).float()[:, None].expand(count, 24)


def test_query_groups_hold_their_queries_then_key_then_value() -> None:
    # 6 query heads of 4 rows in 2 groups: heads 0-2 use key head 0, heads 3-5 key head 1.
    parts = [rows(24, 0), rows(8, 100), rows(8, 200)]
    whole = join(MATRICES["linear_qkv"], SHAPE, parts)[:, 0].int().tolist()
    first = [*range(12), *range(100, 104), *range(200, 204)]
    second = [*range(12, 24), *range(104, 108), *range(204, 208)]
    assert whole == first + second


def test_gate_comes_before_up() -> None:
    whole = join(MATRICES["linear_fc1"], SHAPE, [rows(40, 0), rows(40, 100)])
    assert whole[:, 0].int().tolist() == [*range(40), *range(100, 140)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.megatron)
def test_split_undoes_join(rule) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.rand(part.shape(SHAPE), generator=generator) for part in rule.parts]
    whole = join(rule, SHAPE, parts)
    assert tuple(whole.shape) == rule.shape(SHAPE)
    again = split(rule, SHAPE, whole)
    assert len(again) == len(parts)
    assert all(torch.equal(one, other) for one, other in zip(parts, again, strict=True))
    assert all(part.is_contiguous() for part in again)
    assert (len(parts) == 1) == (rule.join is Join.SAME)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.megatron)
def test_segments_are_the_rows_of_join(rule) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.rand(part.shape(SHAPE), generator=generator) for part in rule.parts]
    pieces = [parts[k][begin : begin + count] for k, begin, count in segments(rule, SHAPE)]
    assert torch.equal(torch.cat(pieces), join(rule, SHAPE, parts))


def test_parts_of_tensors_are_read_as_slices_of_them(tmp_path: Path) -> None:
    tensors = {"a": torch.rand(7, 5).bfloat16(), "b": torch.rand(9)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    stream = iter(tensors.items())
    write_shards(tmp_path, shapes, torch.bfloat16, stream, 10**6)
    file = SafetensorsFile(tmp_path / "model.safetensors")
    for rows in (slice(None), slice(2, 5), slice(3, 3), slice(6, 7)):
        assert torch.equal(file.read("b", rows), tensors["b"].bfloat16()[rows])
        for columns in (slice(None), slice(0, 2), slice(3, 5), slice(2, 2)):
            assert torch.equal(file.read("a", rows, columns), tensors["a"][rows, columns])


def test_every_tensor_has_one_place() -> None:
    shapes = huggingface_shapes(SHAPE)
    assert len(shapes) == 3 + 9 * SHAPE.num_layers
    assert len(placements(SHAPE)) == 3 + 6 * SHAPE.num_layers
    assert shapes["model.layers.2.self_attn.k_proj.weight"] == (8, 24)
    assert shapes["lm_head.weight"] == (11, 24)
    names = [part.name for rule in RULES for part in rule.parts]
    assert len(set(names)) == len(names)


def test_names_are_transformers_own() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=11,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    theirs = LlamaForCausalLM(config).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == huggingface_shapes(
        SHAPE
    )


def test_tied_models_have_no_output_layer() -> None:
    tied = replace(SHAPE, untie_embeddings_and_output_weights=False)
    assert [rule for rule in rules_of(SHAPE) if rule not in rules_of(tied)] == [RULES[-1]]
    assert "lm_head.weight" not in huggingface_shapes(tied)


def test_biases_and_norms_of_heads_are_those_of_the_architecture() -> None:
    def added(**switches: bool) -> set[str]:
        names = huggingface_shapes(replace(SHAPE, **switches)).keys()
        return {name.split("self_attn.")[1] for name in names - huggingface_shapes(SHAPE).keys()}

    assert added(add_qkv_bias=True) == {"q_proj.bias", "k_proj.bias", "v_proj.bias"}
    assert added(qk_layernorm=True) == {"q_norm.weight", "k_norm.weight"}


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("self_attention.linear_qkv.layer_norm_weight",) * 2,
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ],
)
def test_single_layers_norms_of_either_name_and_any_cut_are_read(
    tmp_path: Path, stored: str, name: str
) -> None:
    norm = next(rule for rule in RULES if rule.megatron.endswith(name))
    proj = MATRICES["linear_proj"]
    weight = torch.rand(24, 24)
    chunks = [
        ChunkToWrite(
            f"decoder.layers.1.{stored}", (24,), (0,), (24,), weight.dtype, lambda: weight[0]
        )
    ]
    # Four chunks, as tensor parallelism in both dimensions would produce.
    for top in (0, 10):
        for left in (0, 7):
            piece = weight[top : top + (10, 14)[top > 0], left : left + (7, 17)[left > 0]]
            name = proj.megatron.format(layer=1)
            size = tuple(piece.shape)
            chunks.append(
                ChunkToWrite(name, (24, 24), (top, left), size, weight.dtype, piece.clone)
            )
    write_distributed(tmp_path, chunks, {"note": b"x"})
    reader = DistributedReader(tmp_path)
    assert torch.equal(reader.read(norm, 1), weight[0])
    assert torch.equal(reader.read(proj, 1), weight)
    assert reader.shape(proj, 1) == (24, 24)


def test_shards_hold_at_most_their_size_in_order() -> None:
    sizes = {"a": 5, "b": 5, "c": 30, "d": 1, "e": 9}
    assert plan_shards(sizes, 10) == [["a", "b"], ["c"], ["d", "e"]]
    assert plan_shards(sizes, 1000) == [list(sizes)]
