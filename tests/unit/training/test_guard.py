"""Tests which steps are judged bad, and the consequences."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_chatflow.config import FaultConfig
from megatron_chatflow.errors import UserError
from megatron_chatflow.training.guard import Guard, GuardedOptimizer, Verdict


def _guard(state: dict[str, Any] | None = None, **faults: Any) -> Guard:
    config: Any = SimpleNamespace(faults=FaultConfig(**faults))
    return Guard(config, ["english", "chinese"], state or {})


def _sums(english: float, chinese: float) -> list[list[float]]:
    return [[english * 10, 10, 40], [chinese * 10, 10, 30]]


def test_a_loss_that_is_no_number_names_its_source() -> None:
    verdict = _guard().judge(_sums(2.0, math.nan), 1.0)
    assert verdict.problem == "the loss is not finite (source chinese)"


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_bad(norm: float) -> None:
    assert not _guard().judge(_sums(2.0, 2.0), norm).is_good


def test_a_gradient_norm_above_the_limit_is_bad() -> None:
    guard = _guard(grad_norm_limit=5.0)
    assert guard.judge(_sums(2.0, 2.0), 5.0).is_good
    problem = guard.judge(_sums(2.0, 2.0), 5.25).problem
    assert problem == "the gradient norm 5.25 is above --grad-norm-limit 5"
    assert _guard().judge(_sums(2.0, 2.0), 1e30).is_good


def test_a_source_without_loss_tokens_is_fine() -> None:
    assert _guard().judge([[20.0, 10, 40], [0.0, 0, 0]], 1.0).is_good


@pytest.mark.parametrize("on_nan", ["stop", "skip", "rollback"])
def test_a_step_without_loss_tokens_makes_no_update_and_is_no_fault(on_nan: str) -> None:
    guard = _guard(on_nan=on_nan, max_bad_steps=2, loss_spike_factor=2.0)
    for step in range(12):
        verdict = guard.judge([[0.0, 0, 0], [0.0, 0, 0]], 0.0)
        assert not verdict.is_good and verdict.problem is None
        assert guard.record(verdict, None, step, step + 1) is False
    assert (guard.skipped_no_loss_tokens, guard.num_skipped, guard.num_rollbacks) == (12, 0, 0)
    assert _guard(guard.state()).skipped_no_loss_tokens == 12
    assert guard.state()["losses"] == []


def test_steps_without_loss_tokens_do_not_separate_bad_steps() -> None:
    guard = _guard(on_nan="skip", max_bad_steps=2)
    guard.record(Verdict("bad"), math.nan, 0, 1)
    guard.record(Verdict(None, has_loss_tokens=False), None, 1, 2)
    with pytest.raises(UserError, match="2 bad steps in a row"):
        guard.record(Verdict("bad"), math.nan, 2, 3)


def test_a_loss_that_is_no_number_is_bad_also_without_loss_tokens() -> None:
    assert _guard().judge([[math.nan, 0, 0], [0.0, 0, 0]], 0.0).problem is not None


def test_a_spike_is_measured_against_the_recent_median() -> None:
    guard = _guard(loss_spike_factor=2.0, loss_spike_window=20)
    for step in range(9):
        guard.record(guard.judge(_sums(3.0, 3.0), 1.0), 3.0, step, step + 1)
    assert guard.judge(_sums(7.0, 7.0), 1.0).is_good, "nine losses are too few to judge by"
    guard.record(Verdict(None), 3.0, 9, 10)
    assert guard.judge(_sums(5.9, 5.9), 1.0).is_good
    assert "above 2 times the recent median 3.0000" in str(guard.judge(_sums(6.1, 6.1), 1).problem)


def test_a_spike_does_not_move_the_median() -> None:
    guard = _guard(on_nan="skip", loss_spike_factor=2.0, loss_spike_window=11, max_bad_steps=100)
    for step in range(11):
        guard.record(Verdict(None), 3.0, step, step + 1)
    for step in range(20):
        verdict = guard.judge(_sums(9.0, 9.0), 1.0)
        assert not verdict.is_good
        guard.record(verdict, 9.0, step, step + 1)


def test_policies() -> None:
    bad = Verdict("the loss is not finite (source chinese)")
    with pytest.raises(UserError, match="samples 8 to 16: the loss is not finite.*not applied"):
        _guard().record(bad, math.nan, 8, 16)
    skipping, rolling = _guard(on_nan="skip"), _guard(on_nan="rollback")
    assert skipping.record(bad, math.nan, 8, 16) is False
    assert rolling.record(bad, math.nan, 8, 16) is True
    assert (skipping.num_skipped, skipping.num_rollbacks) == (1, 0)
    assert (rolling.num_skipped, rolling.num_rollbacks) == (1, 1)


def test_too_many_bad_steps_in_a_row_end_the_run_even_across_a_resume() -> None:
    bad = Verdict("bad")
    guard = _guard(on_nan="skip", max_bad_steps=3)
    guard.record(bad, math.nan, 0, 1)
    guard.record(Verdict(None), 2.0, 1, 2)
    guard.record(bad, math.nan, 2, 3)
    guard.record(bad, math.nan, 3, 4)
    resumed = _guard(guard.state(), on_nan="skip", max_bad_steps=3)
    assert resumed.num_skipped == 3
    with pytest.raises(UserError, match="3 bad steps in a row"):
        resumed.record(bad, math.nan, 4, 5)


def test_the_window_of_losses_goes_on_across_a_resume() -> None:
    guard = _guard(loss_spike_factor=2.0)
    for step in range(12):
        guard.record(Verdict(None), 1.0 + step, step, step + 1)
    resumed = _guard(guard.state(), loss_spike_factor=2.0)
    for loss in (1.0, 12.9, 13.1, 40.0):
        sums = _sums(loss, loss)
        assert resumed.judge(sums, 1.0) == guard.judge(sums, 1.0)


class _Optimizer:
    """The interface of megatron-core's optimizer that a step uses."""

    def __init__(self) -> None:
        self.num_updates = 0

    def get_grad_norm(self) -> float:
        return 3.5

    def step_with_ready_grads(self) -> bool:
        self.num_updates += 1
        return True

    def step(self) -> tuple[bool, float, None]:
        norm = self.get_grad_norm()
        return self.step_with_ready_grads(), norm, None


def test_the_update_waits_for_the_judgement() -> None:
    optimizer = _Optimizer()
    guarded = GuardedOptimizer(optimizer)
    assert guarded.step(lambda norm: Verdict(f"norm {norm}")) == (Verdict("norm 3.5"), 3.5)
    assert optimizer.num_updates == 0
    assert guarded.step(lambda norm: Verdict(None)) == (Verdict(None), 3.5)
    assert optimizer.num_updates == 1
    optimizer.step()
    assert optimizer.num_updates == 2, "a step that nobody judges is made"
