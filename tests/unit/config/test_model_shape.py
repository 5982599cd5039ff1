"""Compares the sizes computed from a model shape with published counts and manual sums."""

import pytest

from megatron_chatflow.config import ParallelConfig
from megatron_chatflow.config.memory import MemoryEstimate, estimate_memory
from megatron_chatflow.config.shape import (
    causal_share,
    flops_per_token,
    head_counts,
    num_layer_parameters,
    num_parameters,
    padded_vocab_size,
    unpadded_sizes,
)


def test_tied_embeddings_count_once(config) -> None:
    tied = config({"model.untie_embeddings_and_output_weights": False}).model
    untied = config().model
    assert num_parameters(untied, 1000) - num_parameters(tied, 1000) == 1000 * 256


def test_flops_are_those_of_palm(config) -> None:
    model = config({"model": {"preset": "llama2-7b"}}).model
    expected = 6 * 6_738_415_616 + 12 * 32 * 4096 * 2048
    assert flops_per_token(model, 32_000, 2048) == expected


@pytest.mark.parametrize(("window", "num_seen"), [(2048, 2048), (4096, 2048), (256, 256), (1, 1)])
def test_flops_of_a_sliding_window(config, window: int, num_seen: int) -> None:
    sizes = {"preset": "llama2-7b", "window_size": [window - 1, 0]}
    model = config({"model": sizes}).model
    without = 6 * 6_738_415_616
    flops = flops_per_token(model, 32_000, 2048)
    assert flops == without + 12 * 32 * 4096 * num_seen
    # Each token sees the tokens up to itself, or the window.
    mean = sum(min(k + 1, window) for k in range(2048)) / 2048
    causal = causal_share(model, 32_000, 2048) * flops - without
    assert causal == pytest.approx(12 * 32 * 4096 * (mean - 0.5), abs=12 * 32 * 4096 * 0.5)


def test_heads_may_be_of_another_size_than_their_share(config) -> None:
    nemo = {"num_layers": 40, "hidden_size": 5120, "ffn_hidden_size": 14336, "kv_channels": 128}
    nemo |= {"num_attention_heads": 32, "num_query_groups": 8, "max_position_embeddings": 1024}
    model = config({"model": nemo}).model
    assert num_parameters(model, 131_072) == 12_247_782_400  # as published for Mistral NeMo
    assert model.head_dim == head_counts(model).head_dim == 128
    attention = flops_per_token(model, 131_072, 2048) - 6 * 12_247_782_400
    assert attention == 12 * 40 * (32 * 128) * 2048
    usual = config({"model": {**nemo, "kv_channels": 160}}).model
    assert usual == config({"model": {**nemo, "kv_channels": None}}).model
    assert usual.head_dim == 160


@pytest.mark.parametrize(
    ("tensor", "vocab", "padded"),
    [(1, 32_000, 32_000), (4, 32_001, 32_128), (3, 257, 384), (2, 257, 384)],
)
def test_vocabulary_is_padded_for_every_tensor_parallel_process(
    config, tensor: int, vocab: int, padded: int
) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=tensor)
    assert padded_vocab_size(config().model, parallel, vocab) == padded


def test_heads_are_padded_by_whole_groups(config) -> None:
    shape = {"hidden_size": 576, "num_attention_heads": 9, "num_query_groups": 3}
    model = config({f"model.{name}": value for name, value in shape.items()}).model

    def heads(tensor: int, *, is_padded: bool) -> tuple[int, int, int]:
        parallel = ParallelConfig(tensor_model_parallel_size=tensor, pad_attention_heads=is_padded)
        counts = head_counts(model, parallel)
        return counts.heads, counts.groups, counts.head_dim

    assert heads(2, is_padded=False) == (9, 3, 64)
    assert heads(2, is_padded=True) == (12, 4, 64)
    assert heads(3, is_padded=True) == (9, 3, 64)
    assert heads(8, is_padded=True) == (24, 8, 64)
    parallel = ParallelConfig(tensor_model_parallel_size=2, pad_attention_heads=True)
    added = num_layer_parameters(model, parallel) - num_layer_parameters(model)
    assert added == 576 * 64 * (3 + 2 + 3), "queries, key and value, and output of a group"
    assert unpadded_sizes(model, parallel) == {
        "self_attention.linear_qkv.weight": (-2, 15 * 64),
        "self_attention.linear_qkv.bias": (-1, 15 * 64),
        "self_attention.linear_proj.weight": (-1, 9 * 64),
    }
    assert unpadded_sizes(model, ParallelConfig(pad_attention_heads=True)) == {}


def test_memory_of_7b_without_sharding_is_18_bytes_a_parameter_and_activations(config) -> None:
    run = config({"model": {"preset": "llama2-7b"}})
    memory = estimate_memory(run, 32_000, world_size=1)
    num = num_parameters(run.model, 32_000)
    assert memory.weights + memory.gradients + memory.optimizer == pytest.approx(18 * num, rel=1e-6)
    kept = memory.activations + memory.temporary
    assert memory.total == 18 * (memory.weights // 2) + kept


def test_memory_falls_with_what_is_meant_to_save_it(config) -> None:
    def total(world_size: int = 8, **changes: object) -> int:
        named = {name.replace("__", "."): value for name, value in changes.items()}
        return estimate_memory(config(named), 32_000, world_size).total

    whole = total()
    tensor = total(parallel__tensor_model_parallel_size=4)
    sequence = total(parallel__tensor_model_parallel_size=4, parallel__sequence_parallel=True)
    sharded = total(parallel__use_distributed_optimizer=True)
    block = {"train__recompute_granularity": "full", "train__recompute_method": "block"}
    uniform = {**block, "train__recompute_method": "uniform"}
    assert sequence < tensor < whole
    assert sharded < whole
    assert total(**block, train__recompute_num_layers=4) < whole
    assert total(**block, train__recompute_num_layers=2) < whole
    assert total(**uniform, train__recompute_num_layers=1) < whole


def test_fp8_stores_matrices_twice_and_the_inputs_of_products_in_a_byte(config) -> None:
    def estimate(**train: object) -> MemoryEstimate:
        changes = {f"train.{name}": value for name, value in train.items()}
        sharded = {"parallel.use_distributed_optimizer": True}
        run = config({"model": {"preset": "llama2-7b"}, **sharded, **changes})
        return estimate_memory(run, 32_000, world_size=2)

    plain, fp8 = estimate(), estimate(fp8_format="hybrid")
    tokens, hidden, ffn, layer = 2 * 128, 4096, 11_008, 202_383_360
    assert fp8.weights - plain.weights == 2 * 32 * layer
    # The outputs of both norms, and SwiGLU's.
    assert plain.activations - fp8.activations == 32 * tokens * (2 * hidden + ffn)
    # Attention stores the context in bf16; the projection, by this recipe, in FP8 too.
    delayed = estimate(fp8_format="hybrid", fp8_recipe="delayed")
    assert delayed.activations - fp8.activations == 32 * tokens * hidden
    # Of 32 layers, the first and the last are in bf16.
    middle = estimate(fp8_format="hybrid", first_last_layers_bf16=True)
    assert middle.weights - plain.weights == 2 * 30 * layer
    assert estimate(fp8_format="hybrid", fp8_param_gather=True).weights == plain.weights
    offloaded = estimate(fine_grained_activation_offloading=True, offload_modules=["qkv_linear"])
    # The last layer's stay on the GPU.
    assert plain.activations - offloaded.activations == 31 * tokens * 2 * 2 * hidden
