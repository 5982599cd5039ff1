"""Tests the learning rate over a run."""

import pytest

from megatron_chatflow.config import RunLength
from megatron_chatflow.training.learning_rate import learning_rate


def test_a_warmup_begins_with_its_initial_rate(make_config) -> None:
    changes = {"optimizer__lr_warmup_iters": 4, "optimizer__lr_decay_style": "constant"}
    for initial, expected in (
        (0.0, [0, 0.25, 0.5, 0.75, 1]),
        (1e-3, [1 / 3, 0.5, 2 / 3, 5 / 6, 1]),
    ):
        config = make_config(optimizer__lr_warmup_init=initial, **changes)
        length = RunLength.of(config)
        rates = [learning_rate(config.optimizer, length, i, 8 * i) for i in range(5)]
        assert rates == pytest.approx([3e-3 * part for part in expected])


def test_samples_and_iterations_agree_while_the_batch_size_is_constant(make_config) -> None:
    changes = {"optimizer__min_lr": 3e-4, "optimizer__lr_warmup_iters": 3}
    one = make_config(**changes)
    other = make_config(train__train_iters=None, train__train_samples=80, **changes)
    for iteration in range(11):
        assert learning_rate(
            one.optimizer, RunLength.of(one), iteration, 8 * iteration
        ) == learning_rate(other.optimizer, RunLength.of(other), iteration, 8 * iteration)
