"""Tests the ramp of the batch size against Megatron-LM's own and against counting step by step."""

import numpy as np
import pytest
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from megatron_chatflow.config import RunLength
from megatron_chatflow.config.batch_ramp import BatchSizes
from megatron_chatflow.config.validation import validate_for_world
from megatron_chatflow.errors import UserError

RAMPS = [
    (8, (8, 8, 1)),
    (64, (8, 8, 1000)),
    (64, (16, 16, 7)),
    (96, (32, 16, 12_345)),
    (60, (4, 7, 3_001)),
    (512, (32, 32, 5_000_000)),
]


@pytest.mark.parametrize("full, ramp", RAMPS[1:])
def test_sizes_are_megatrons(full: int, ramp: tuple[int, int, int]) -> None:
    start, increment, samples = ramp
    megatron = RampupBatchsizeNumMicroBatchesCalculator(
        full, 1, 1, False, 0, start, increment, samples
    )
    sizes = BatchSizes.of(full, ramp)
    consumed = 0
    while consumed < 2 * samples:
        megatron.update(consumed, consistency_check=False)
        assert sizes.at(consumed) == megatron.get_current_global_batch_size()
        consumed += sizes.at(consumed)
    assert sizes.at(consumed) == full


@pytest.mark.parametrize("full, ramp", [*RAMPS, (24, None)])
def test_counting_step_by_step_agrees(full: int, ramp: tuple[int, int, int] | None) -> None:
    if ramp is not None:
        ramp = (*ramp[:2], min(ramp[2], 20_000))
    sizes = BatchSizes.of(full, ramp)
    consumed = [0]
    while len(consumed) < 1000:
        consumed.append(consumed[-1] + sizes.at(consumed[-1]))
    iterations = np.arange(1000)
    assert sizes.samples_after(0, iterations).tolist() == consumed
    for begin in (0, 3, 40, 999):
        after = sizes.samples_after(consumed[begin], iterations[: 1000 - begin])
        assert after.tolist() == consumed[begin:]
        for end in (*consumed[begin::97], consumed[begin] - 1, consumed[-1] - 1):
            expected = max(int(np.searchsorted(consumed, end, side="right")) - 1 - begin, 0)
            assert sizes.whole_iterations(consumed[begin], end) == expected


def test_a_run_ends_with_the_last_whole_batch(config) -> None:
    length = RunLength.of(config(ramped()))
    # 8 x 13 up to the first 100 samples, 16 x 6 up to 200, 24 x 4 up to 300, then 32.
    assert length.batch_sizes.pieces(0) == [(0, 0, 8), (13, 104, 16), (19, 200, 24), (24, 320, 32)]
    assert (length.last_iteration, length.num_samples) == (24 + 21, 320 + 21 * 32)
    assert (length.lr_decay, length.end) == (1000, 1000)
    assert [length.iteration_of(sample) for sample in (0, 7, 8, 103, 104, 319, 320)] == [
        *(1, 1, 2, 13, 14, 24, 25)
    ]
    resumed = RunLength.of(config(ramped()), 14, 120, 32)
    assert (resumed.last_iteration, resumed.num_samples) == (45, 992)
    assert resumed.iteration_of(119) == 14 and resumed.iteration_of(120) == 15


def ramped(**changes: object) -> dict[str, object]:
    return {
        "train.train_iters": None,
        "train.train_samples": 1000,
        "train.global_batch_size": 32,
        "train.micro_batch_size": 4,
        "train.rampup_batch_size": [8, 8, 300],
        "optimizer.lr_warmup_iters": 0,
        **changes,
    }


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train.train_samples": None, "train.train_iters": 9}, "requires train.train_samples"),
        ({"train.rampup_batch_size": [32, 8, 300]}, "32, which is not below .*size 32"),
        ({"train.rampup_batch_size": [8, 7, 300]}, "steps of 7 from 8 .* use a divisor of 24"),
        ({"train.rampup_batch_size": [8, 8]}, "must have at least 3 values, not 2"),
        ({"train.rampup_batch_size": [8, 8, 8, 8]}, "must have at most 3 values, not 4"),
        ({"train.rampup_batch_size": [8, 0, 300]}, r"rampup_batch_size\[1\]"),
        ({"train.rampup_batch_size": 8}, "rampup_batch_size: "),
        ({"train.train_samples": 7}, "train_samples: 7 is below the first batch's 8"),
        ({"optimizer.lr_warmup_iters": 2}, "lr_warmup_iters: .*set optimizer.lr_warmup_samples"),
        ({"data.schedule.unit": "iterations"}, "unit: counts iterations, .*samples or tokens"),
        ({"train.cuda_graph_impl": "transformer_engine"}, "rampup_batch_size: .*CUDA graphs"),
    ],
)
def test_what_cannot_be_is_refused(config, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(ramped(**changes))


def test_every_size_has_to_fit_the_ranks(config) -> None:
    validate_for_world(config(ramped()), 2)
    with pytest.raises(UserError, match=r"rampup_batch_size: 8 is not .* use a multiple of 16"):
        validate_for_world(config(ramped()), 4)
    changes = {"train.rampup_batch_size": [16, 8, 300]}
    with pytest.raises(UserError, match=r"rampup_batch_size: 24 is not .* use a multiple of 16"):
        validate_for_world(config(ramped(**changes)), 4)


def test_units_and_flags_are_read(config) -> None:
    run = config(ramped(**{"train.rampup_batch_size": [8, 8, "5M"], "train.train_samples": "1B"}))
    assert run.train.rampup_batch_size == (8, 8, 5_000_000)
