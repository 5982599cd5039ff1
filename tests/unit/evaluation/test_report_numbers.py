"""What the report does to numbers: fewer points, moving means, axes, ticks, text."""

import math

import numpy as np
import pytest

from megatron_chatflow.report.charts import Scale, fit
from megatron_chatflow.report.data import condense, smooth
from megatron_chatflow.runtime.table import format_percent, format_value


def test_condense_keeps_means_ends_and_extremes() -> None:
    x = np.arange(1000.0)
    y = np.zeros(1000)
    y[501] = -7.0
    y[10:20] = np.nan
    assert condense(x, y, "extreme", 100)[1][50] == -7.0
    assert condense(x, x, "last", 100)[1][-1] == 999.0
    few_x, mean = condense(x, y, "mean", 100)
    assert len(few_x) == 100 and np.isnan(mean[1]) and mean[50] == pytest.approx(-0.7)


def test_smooth_is_a_centred_mean_that_keeps_gaps() -> None:
    y = np.array([0.0, 3.0, np.nan, 6.0, 9.0])
    assert smooth(y, 3).tolist()[:2] == [1.5, 1.5]
    assert np.isnan(smooth(y, 3)[2]) and smooth(y, 3)[4] == 7.5
    assert smooth(np.array([1.0, 5.0]), 9).tolist() == [3.0, 3.0]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 7e6), (2.9, 2.91), (1e-9, 3e-9)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    ticks = Scale(low, high, 0, 100).ticks()
    assert 3 <= len(ticks) <= 7
    assert all(low - 1e-12 <= tick <= high * (1 + 1e-12) for tick in ticks)
    assert len({f"{tick:.6g}" for tick in ticks}) == len(ticks)


def test_log_scale_and_empty_data() -> None:
    scale = fit([np.array([0.01, 100.0, 0.0, np.nan])], 0, 100, log=True)
    assert 0 < scale.low < 0.01 and scale.high > 100
    assert np.isnan(scale.pixels(np.array([0.0]))[0])
    assert {0.1, 1.0, 10.0} <= set(scale.ticks())
    assert fit([], 0, 10).high == 1.0
    assert fit([np.array([5.0])], 0, 10).low < 5 < fit([np.array([5.0])], 0, 10).high


def test_numbers_as_text() -> None:
    assert [format_value(v) for v in (0, 1234567, 12345, 1234, 3e-5, 0.25, math.nan)] == [
        "0",
        "1.235M",
        "12.35K",
        "1,234",
        "3e−5",
        "0.25",
        "–",
    ]
    assert format_value(-2.5) == "−2.5"
    assert [format_percent(v) for v in (0.5, 0.1234, math.nan)] == ["50 %", "12.3 %", "–"]
