"""Tests the settings that are passed to megatron-core's pipeline schedules."""

from dataclasses import replace

import pytest

from megatron_chatflow.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_chatflow.model.llama import transformer_config
from megatron_chatflow.runtime.ranks import Ranks


@pytest.mark.parametrize("fuses_weight_gradients", [False, True])
@pytest.mark.parametrize("num_virtual_stages", [None, 2])
def test_exchanges_do_not_synchronize_and_sent_outputs_are_freed(
    single_rank: Ranks, num_virtual_stages: int | None, fuses_weight_gradients: bool
) -> None:
    parallel = ParallelConfig(
        pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=num_virtual_stages
    )
    train = TrainConfig(train_iters=1, micro_batch_size=1, global_batch_size=2)
    ranks = replace(single_rank, pipeline_parallel_size=2)
    config = transformer_config(
        ModelConfig(
            num_layers=4,
            hidden_size=64,
            ffn_hidden_size=176,
            num_attention_heads=4,
            max_position_embeddings=64,
        ),
        parallel,
        train,
        ranks,
        fuses_weight_gradients=fuses_weight_gradients,
    )
    assert not config.batch_p2p_sync
    # An interleaved schedule would free outputs while they are still being sent.
    assert config.deallocate_pipeline_outputs == (num_virtual_stages is None)
    assert config.gradient_accumulation_fusion == fuses_weight_gradients
