"""Compares the closed form of the learning rate with megatron-core's scheduler, step by step."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_chatflow.config import RunConfig, RunLength
from megatron_chatflow.config.learning_rate import learning_rate, learning_rates
from megatron_chatflow.errors import UserError
from megatron_chatflow.training.optimizer import build_scheduler

WSD = {"optimizer__lr_decay_style": "WSD", "optimizer__lr_wsd_decay_iters": 7}
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"optimizer__lr_decay_style": "constant"},
    "linear": {"optimizer__lr_decay_style": "linear"},
    "cosine": {},
    "cosine that ends early": {"optimizer__lr_decay_iters": 19},
    "no warmup": {"optimizer__lr_warmup_iters": 0},
    "inverse square root": {"optimizer__lr_decay_style": "inverse-square-root"},
    "inverse square root without warmup": {
        "optimizer__lr_decay_style": "inverse-square-root",
        "optimizer__lr_warmup_iters": 0,
    },
    **{
        f"WSD {style}": {**WSD, "optimizer__lr_wsd_decay_style": style}
        for style in ("exponential", "linear", "cosine", "minus_sqrt")
    },
    "WSD that decays after the warmup": {**WSD, "optimizer__lr_wsd_decay_iters": 26},
    "second cycle": {"optimizer__lr_cycle_start_iters": 11},
}


@pytest.fixture(params=SCHEDULES)
def config(request: pytest.FixtureRequest, make_config: Any) -> RunConfig:
    defaults = {
        "train__train_iters": 30,
        "optimizer__min_lr": 3e-4,
        "optimizer__lr_warmup_init": 1e-5,
        "optimizer__lr_warmup_iters": 4,
        "checkpoint__load": "runs/any",
    }
    config: RunConfig = make_config(**{**defaults, **SCHEDULES[request.param]})
    return config


def test_it_equals_megatron_core_s_scheduler_at_every_step(config: RunConfig) -> None:
    length = RunLength.of(config, config.optimizer.lr_cycle_start_iters)
    scheduler = build_scheduler(
        config.optimizer, length, SimpleNamespace(param_groups=[{"wd_mult": 1.0}])
    )
    iterations = np.arange(length.iteration, 35)
    expected = []
    for iteration in iterations.tolist():
        scheduler.num_steps = 0
        scheduler.step(length.lr_position(iteration, 8 * iteration))
        expected.append(scheduler.optimizer.param_groups[0]["lr"])
    found = learning_rates(config.optimizer, length, iterations - length.lr_start)
    np.testing.assert_allclose(found, expected, rtol=1e-14, atol=0)
    assert learning_rate(config.optimizer, length, 13, 8 * 13) == found[13 - length.iteration]
    # Something changes, unless the rate is constant.
    assert len(set(expected)) > 4


def test_a_warmup_begins_with_its_initial_rate(make_config: Any) -> None:
    changes = {"optimizer__lr_warmup_iters": 4, "optimizer__lr_decay_style": "constant"}
    for initial, expected in (
        (0.0, [0, 0.25, 0.5, 0.75, 1]),
        (1e-3, [1 / 3, 0.5, 2 / 3, 5 / 6, 1]),
    ):
        config = make_config(optimizer__lr_warmup_init=initial, **changes)
        length = RunLength.of(config)
        rates = [learning_rate(config.optimizer, length, i, 8 * i) for i in range(5)]
        assert rates == pytest.approx([3e-3 * part for part in expected])


def test_samples_are_iterations_times_the_batch_size(make_config: Any) -> None:
    changes = {"optimizer__min_lr": 3e-4, "optimizer__lr_warmup_iters": 4, **WSD}
    one = make_config(train__train_iters=30, **changes)
    changes = {**changes, "optimizer__lr_wsd_decay_iters": None}
    other = make_config(
        train__train_iters=None,
        train__train_samples=30 * 8,
        optimizer__lr_wsd_decay_samples=7 * 8,
        **changes,
    )
    for iteration in range(31):
        assert learning_rate(
            one.optimizer, RunLength.of(one), iteration, 8 * iteration
        ) == learning_rate(other.optimizer, RunLength.of(other), iteration, 8 * iteration)


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_weight_decay_grows(make_config: Any, style: str) -> None:
    config = make_config(
        train__train_iters=10,
        optimizer__weight_decay_incr_style=style,
        optimizer__start_weight_decay=0.01,
        optimizer__end_weight_decay=0.11,
    )
    group = {"wd_mult": 1.0}
    scheduler = build_scheduler(
        config.optimizer, RunLength.of(config), SimpleNamespace(param_groups=[group])
    )
    found = [group["weight_decay"]]
    for _ in range(11):
        scheduler.step(1)
        found.append(group["weight_decay"])
    ratio = np.minimum(np.arange(12) / 10, 1)
    part = ratio if style == "linear" else 0.5 * (np.cos(np.pi * (1 - ratio)) + 1)
    assert found == pytest.approx(0.01 + 0.1 * part)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer__lr_decay_style": "WSD"}, "lr_wsd_decay_iters: is missing, and optimizer.lr_"),
        ({"optimizer__lr_wsd_decay_iters": 3}, "lr_wsd_decay_iters: is set, and optimizer.lr_deca"),
        (
            {"optimizer__lr_wsd_decay_style": "linear"},
            "lr_wsd_decay_style: needs optimizer.lr_decay_style WSD; set that",
        ),
        (
            {**WSD, "optimizer__lr_warmup_iters": 25},
            "lr_wsd_decay_iters: 7 is above the 5 iterations between the warmup and the end",
        ),
        ({**WSD, "optimizer__lr_wsd_decay_samples": 9}, "lr_wsd_decay_samples: both are set"),
        (
            {"optimizer__lr_cycle_start_iters": 9},
            "lr_cycle_start_iters: the cycle begins after 9 iterations, and the run continues aft",
        ),
        (
            {"optimizer__start_weight_decay": 0.1},
            "start_weight_decay: needs optimizer.weight_decay_incr_style linear or cosine",
        ),
        (
            {"optimizer__weight_decay_incr_style": "linear", "optimizer__end_weight_decay": 0.1},
            "weight_decay_incr_style: linear needs optimizer.start_weight_decay and",
        ),
        (
            {
                "optimizer__weight_decay_incr_style": "cosine",
                "optimizer__start_weight_decay": 0.2,
                "optimizer__end_weight_decay": 0.1,
            },
            "start_weight_decay: 0.2 is above optimizer.end_weight_decay 0.1",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(
    make_config: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_config(**{"train__train_iters": 30, **changes})


def test_a_cycle_needs_a_longer_run(make_config: Any) -> None:
    changes = {"checkpoint__load": "runs/any", "optimizer__lr_cycle_start_iters": 20}
    config = make_config(train__train_iters=20, **changes)
    with pytest.raises(UserError, match="lr_cycle_start_iters: the cycle begins after 20.*longer"):
        RunLength.of(config, 20, 80).check_learning_rate(config.optimizer)
