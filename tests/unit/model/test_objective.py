"""Compares the gradients of a weighted objective with an explicitly weighted loss."""

import numpy as np
import pytest
import torch
from megatron.core.utils import get_model_config

from megatron_chatflow.blend.objective import ObjectiveWeights
from megatron_chatflow.blend.schedule import Positions
from megatron_chatflow.config import (
    DataConfig,
    KnotConfig,
    ModelConfig,
    ParallelConfig,
    ScheduleConfig,
    SourceConfig,
    TrainConfig,
)
from megatron_chatflow.data.loader import MicroBatch
from megatron_chatflow.model.forward import ForwardStep
from megatron_chatflow.model.llama import build_llama
from megatron_chatflow.model.objective import Objective
from megatron_chatflow.runtime.launch import device_mode
from megatron_chatflow.runtime.ranks import Ranks

VOCAB, LENGTH = 50, 8
WEIGHTS = (2.0**-12, 3 * 2.0**-10, 2.0**-10)


def weights_of(
    own: tuple[float, ...], *knots: dict[str, object], unit: str = "samples"
) -> ObjectiveWeights:
    """Returns the weights of sources s0, s1, ... along knots, by default one without weights."""
    sources = {
        f"s{k}": SourceConfig(paths=("d",), objective_weight=weight) for k, weight in enumerate(own)
    }
    given = [KnotConfig(weights={"s0": 1}, **knot) for knot in knots or ({"at": 0},)]
    schedule = ScheduleConfig(unit=unit, knots=tuple(given))
    data = DataConfig(seq_length=LENGTH, sources=sources, schedule=schedule)
    return ObjectiveWeights(data, Positions(unit, 4, 0, LENGTH))


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
    # Half way between two knots, the weights are those of WEIGHTS.
    ends = ({f"s{k}": part * w for k, w in enumerate(WEIGHTS)} for part in (0.5, 1.5))
    knots = [
        {"at": at, "objective_weights": end, "ramp": ramp}
        for at, end, ramp in zip((0, 100), ends, ("step", "linear"), strict=True)
    ]
    objective = Objective(weights_of((1.0, 1.0, 1.0), *knots), single_rank.device)
    objective.begin_step(50)
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
    objective = Objective(weights_of((2.0, 1.0)), torch.device("cpu"))
    mask, source = torch.ones(3), torch.tensor([0, 1, 0])
    with torch.no_grad():
        assert objective.weigh(mask, source).tolist() == [2.0, 1.0, 2.0]
    assert float(objective.take_total()) == 0.0


def test_weights_along_the_knots() -> None:
    weights = weights_of(
        (2.0, 3.0),
        {"at": 8, "objective_weights": {"s0": 1.0}},
        {"at": 12, "objective_weights": {"s1": 5.0}, "ramp": "linear"},
        {"at": 16, "objective_weights": {"s0": 6.0, "s1": 1.0}, "ramp": "cosine"},
        {"at": 20, "ramp": "step"},
    )
    found = {sample: weights.at(sample) for sample in (0, 8, 9, 12, 13, 14, 16, 19, 20, 99)}
    assert found[0] == found[8] == [1.0, 3.0]
    assert found[9] == [1.25, 3.5]
    assert found[12] == [2.0, 5.0]
    assert found[13] == pytest.approx([2 + 4 * 0.1464466, 5 - 4 * 0.1464466])
    assert found[14] == pytest.approx([4.0, 3.0])
    assert found[16] == found[19] == [6.0, 1.0]
    assert found[20] == found[99] == [2.0, 3.0]
    assert not weights.are_equal and not weights.are_constant


def test_positions_have_the_unit_of_the_schedule() -> None:
    knots = [{"at": at, "objective_weights": {"s0": at + 1.0}} for at in (0, 24)]
    for unit, change in (("samples", 24), ("iterations", 96), ("tokens", 3)):
        weights = weights_of((1.0, 1.0), *knots, unit=unit)
        assert weights.at(change - 1) == [1.0, 1.0]
        assert weights.at(change) == [25.0, 1.0]


def test_equal_weights_are_recognized() -> None:
    assert weights_of((3.0, 3.0)).are_equal
    same = {"at": 9, "objective_weights": {"s0": 2.0, "s1": 2.0}}
    assert weights_of((1.0, 1.0), {"at": 0}, same).are_equal  # only ratios count
    assert not weights_of((3.0, 1.0)).are_equal
    assert weights_of((3.0, 1.0)).are_constant
