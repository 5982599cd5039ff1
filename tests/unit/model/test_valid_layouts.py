"""Tests that megatron-core accepts every layout that the configuration accepts."""

import random
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from megatron_chatflow.config import RunConfig, validate_for_world
from megatron_chatflow.config.shape import num_model_chunks
from megatron_chatflow.errors import UserError
from megatron_chatflow.model.llama import transformer_config
from megatron_chatflow.runtime.ranks import ProcessRank, Ranks

NUM_DRAWN = 10_000


def _ranks() -> Ranks:
    return Ranks(ProcessRank(0, 1, 0, 1), torch.device("cpu"), *[0, 1] * 4)


def _draw(rng: random.Random) -> tuple[dict[str, Any], int]:
    """Draws sizes that may or may not be compatible, and a number of processes."""

    def some(*values: Any) -> Any:
        return rng.choice(values)

    heads = some(2, 4, 6, 8)
    full = {"recompute_method": some("uniform", "block"), "recompute_num_layers": some(1, 2, 4)}
    recompute = some({}, {"recompute_granularity": "selective"}, {"recompute_granularity": "full"})
    values: dict[str, Any] = {
        "model": {
            "num_layers": some(2, 4, 6, 8),
            "hidden_size": heads * some(8, 9, 16),
            "ffn_hidden_size": some(64, 96, 100),
            "num_attention_heads": heads,
            "num_query_groups": some(1, 2, 3, 4),
            "max_position_embeddings": 128,
        },
        "tokenizer": {"tokenizer_model": "tokenizer.model"},
        "parallel": {
            "tensor_model_parallel_size": some(1, 2, 3, 4),
            "pipeline_model_parallel_size": some(1, 2, 3, 4),
            "context_parallel_size": some(1, 1, 2, 3),
            "sequence_parallel": some(True, False),
            some(
                "num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"
            ): some(None, None, 1, 2, 3),
            "use_distributed_optimizer": some(True, False),
            "overlap_grad_reduce": some(True, False),
            "overlap_param_gather": some(True, False),
        },
        "data": {"seq_length": some(60, 64, 72), "sources": {"one": {"paths": ["one"]}}},
        "optimizer": {"lr": 1e-3},
        "train": {
            "train_iters": 2,
            "micro_batch_size": some(1, 2),
            "global_batch_size": some(4, 6, 8),
            **recompute,
            **(full if recompute.get("recompute_granularity") == "full" else {}),
        },
    }
    return values, some(1, 2, 4, 6, 8, 12)


def _check_with_megatron(run: RunConfig, world_size: int) -> None:
    """Calls megatron-core's own code, which raises on layouts that it cannot run."""
    parallel = run.parallel
    settings = transformer_config(run.model, parallel, run.train, _ranks())
    num_chunks = num_model_chunks(run.model, parallel)
    stages = parallel.pipeline_model_parallel_size
    layers = [
        get_num_layers_to_build(settings, chunk if num_chunks > 1 else None, stage)
        for chunk in range(num_chunks)
        for stage in range(stages)
    ]
    assert sum(layers) == run.model.num_layers and min(layers) > 0
    data_parallel = world_size // run.model_parallel_size
    num_micro_batches = run.train.global_batch_size // (data_parallel * run.train.micro_batch_size)
    if num_chunks > 1:
        group = settings.microbatch_group_size_per_vp_stage
        # The two conditions that its interleaved schedule checks at every step.
        assert stages <= group <= num_micro_batches
        assert num_micro_batches % group == 0 or num_micro_batches % group >= stages
        table = get_schedule_table(num_micro_batches, num_chunks, group)
        assert len(set(table)) == num_micro_batches * num_chunks
    tokens = run.train.micro_batch_size * run.data.seq_length
    assert tokens % (2 * parallel.context_parallel_size) == 0 or parallel.context_parallel_size == 1
    if parallel.sequence_parallel:
        share = tokens // parallel.context_parallel_size
        assert share % parallel.tensor_model_parallel_size == 0


def test_what_is_accepted_runs_and_what_is_refused_says_why_in_a_line() -> None:
    rng = random.Random(0)
    num_accepted = 0
    reasons = set()
    for _ in range(NUM_DRAWN):
        values, world_size = _draw(rng)
        try:
            run = RunConfig.from_dict(values)
            validate_for_world(run, world_size)
        except UserError as error:
            text = str(error)
            assert "\n" not in text and ": " in text
            reasons.add(text.split(":")[0])
            continue
        num_accepted += 1
        _check_with_megatron(run, world_size)
    assert num_accepted >= 80
    assert len(reasons) >= 10, reasons
