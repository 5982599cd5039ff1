"""Compares closed-form quotas with plain sums."""

import random

import pytest
from blend_cases import schedules, weights_matrix
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.blend.quota import GRID, NEVER, Quota, floor_sum
from megatron_chatflow.blend.schedule import Schedule

pytestmark = pytest.mark.native


@given(st.integers(0, 60), st.integers(1, 50), st.integers(0, 200), st.integers(0, 200))
def test_floor_sum_equals_the_sum(terms: int, modulus: int, factor: int, shift: int) -> None:
    expected = sum((factor * x + shift) // modulus for x in range(terms))
    assert floor_sum(terms, modulus, factor, shift) == expected


@settings(max_examples=60, deadline=None)
@given(schedules(), st.integers(0, 40))
def test_quotas_and_inverses_equal_brute_force(schedule: Schedule, begin: int) -> None:
    end = 400
    weights = weights_matrix(schedule, 0, end)
    base = [7 * k - 5 for k in range(weights.shape[1])]
    quota = Quota(schedule.table(), begin, base)
    for k in range(weights.shape[1]):
        sums = {begin: base[k]}
        for sample in range(begin, end):
            sums[sample + 1] = sums[sample] + int(weights[sample, k])
        for sample in range(begin, end, 7):
            assert quota.quotas(sample)[k] == sums[sample]
        due = sums[end] - base[k]
        targets = [base[k] + due * part // 9 for part in range(10)] + [sums[end // 2], base[k] - 1]
        for target in targets:
            least = quota.first_at_least(k, target)
            assert least == next(i for i, value in sums.items() if value >= target)
            if target < sums[end]:
                last = quota.last_at_most(k, target)
                assert last == max([i for i, v in sums.items() if v <= target], default=begin - 1)


def test_a_quota_that_is_never_reached() -> None:
    block = {"knots": [{"at": 0, "weights": {"a": 1}}, {"at": 8, "weights": {"b": 1}}]}
    quota = Quota(Schedule.from_dict(block, ["a", "b"], 4).table())
    assert quota.first_at_least(0, 8 * GRID) == 8
    assert quota.first_at_least(0, 8 * GRID + 1) == NEVER


def test_quotas_far_out_equal_differences_of_weights() -> None:
    """At positions of a 2**40-sample run, one more sample adds exactly its weight to the quota."""
    rng = random.Random(4)
    block = {
        "knots": [
            {"at": 3, "weights": {"a": 1, "b": 7, "c": 2}},
            {"at": (1 << 39) + 1, "weights": {"a": 5, "c": 2}, "ramp": "linear"},
            {"at": (1 << 40) - 5, "weights": {"b": 1, "c": 1e-6}, "ramp": "cosine"},
        ]
    }
    for batch in (1, 8, 512, 1000003):
        schedule = Schedule.from_dict(block, list("abc"), batch)
        quota = Quota(schedule.table())
        for _ in range(50):
            sample = rng.randrange(1 << 40)
            grown = [
                b - a for a, b in zip(quota.quotas(sample), quota.quotas(sample + 1), strict=True)
            ]
            assert grown == schedule.weights(sample).tolist()
            assert sum(quota.quotas(sample)) == sample * GRID
            k = rng.randrange(3)
            reached = quota.first_at_least(k, quota.quotas(sample)[k])
            assert quota.quotas(reached)[k] >= quota.quotas(sample)[k] and reached <= sample
