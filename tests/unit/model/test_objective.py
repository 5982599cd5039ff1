"""Compares the gradients of a weighted objective with an explicitly weighted loss."""

import numpy as np
import torch
from megatron.core.utils import get_model_config

from megatron_chatflow.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_chatflow.data.loader import MicroBatch
from megatron_chatflow.model.forward import ForwardStep
from megatron_chatflow.model.llama import build_llama
from megatron_chatflow.model.objective import Objective
from megatron_chatflow.runtime.launch import device_mode
from megatron_chatflow.runtime.ranks import Ranks

VOCAB, LENGTH = 50, 8
WEIGHTS = (2.0**-12, 3 * 2.0**-10, 2.0**-10)


def micro_batch(seed: int) -> MicroBatch:
    """Returns two samples of documents of several sources, with masked tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (2, LENGTH + 1), generator=generator)
    return MicroBatch(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        loss_mask=(torch.rand(2, LENGTH, generator=generator) < 0.7).float(),
        cu_seqlens=torch.tensor([0, 3, LENGTH, LENGTH + 5, 2 * LENGTH], dtype=torch.int32),
        source=torch.tensor([seed % 3, 1]),
        sample_index=torch.zeros(2, dtype=torch.int64),
    )


def test_the_gradient_is_that_of_the_weighted_mean(single_rank: Ranks) -> None:
    model = ModelConfig(
        num_layers=1,
        hidden_size=16,
        ffn_hidden_size=32,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
    )
    train = TrainConfig(train_iters=1, micro_batch_size=2, global_batch_size=4, bf16=False)
    with device_mode(single_rank.device):
        llama = build_llama(model, ParallelConfig(), train, single_rank, vocab_size=VOCAB)
    objective = Objective(WEIGHTS, single_rank.device)
    forward = ForwardStep.build(
        llama,
        single_rank,
        num_bytes_per_id=np.ones(VOCAB, np.int64),
        num_sources=3,
        objective=objective,
    )
    (chunk,) = llama.chunks
    assert get_model_config(chunk).calculate_per_token_loss
    batches = [micro_batch(seed) for seed in (0, 2)]
    counted = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        hidden, loss_function = forward(iter([batch]), chunk)
        total, _, sums = loss_function(hidden)
        total.backward()
        counted += sums[:, 1]
    divisor = float(objective.take_total())
    assert divisor >= float(counted.sum())  # megatron-core 0.19 divides by at least 1
    found = {name: p.grad / divisor for name, p in chunk.named_parameters()}
    total_weight = float((counted * torch.tensor(WEIGHTS)).sum())
    assert divisor == total_weight / min(WEIGHTS)
    assert float(objective.take_total()) == 0.0

    chunk.zero_grad()
    weighted, weights = torch.zeros(()), torch.tensor(WEIGHTS)
    for batch in batches:
        hidden, _ = forward(iter([batch]), chunk)
        logits = hidden[0] @ llama.output_weight[:VOCAB].t()
        losses = torch.nn.functional.cross_entropy(logits, batch.labels.flatten(), reduction="none")
        factors = weights[batch.source].repeat_interleave(LENGTH) * batch.loss_mask.flatten()
        weighted = weighted + (losses * factors).sum()
    (weighted / total_weight).backward()
    for name, parameter in chunk.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_validation_is_not_part_of_the_objective() -> None:
    objective = Objective([2.0, 1.0], torch.device("cpu"))
    mask, source = torch.ones(3), torch.tensor([0, 1, 0])
    with torch.no_grad():
        assert objective.weigh(mask, source).tolist() == [2.0, 1.0, 2.0]
    assert float(objective.take_total()) == 0.0
