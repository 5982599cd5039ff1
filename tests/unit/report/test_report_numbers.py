"""Tests the report's processing of numbers: thinning, moving means, axis positions, formatting."""

import math

import numpy as np
import pytest

from megatron_chatflow.report.data import TOKENS, XAxis, condense, smooth
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


def test_smooth_bridges_gaps_that_the_window_covers() -> None:
    y = np.array([0.0, 3.0, np.nan, 6.0, 9.0, np.nan, np.nan, np.nan, 1.0])
    expected = [1.5, 1.5, 4.5, 7.5, 7.5, 9.0, np.nan, 1.0, 1.0]
    assert np.allclose(smooth(y, 3), expected, equal_nan=True)
    assert smooth(y, 1) is y
    assert smooth(np.array([1.0, 5.0]), 9).tolist() == [3.0, 3.0]


def test_positions_between_and_beyond_logged_iterations() -> None:
    axis = XAxis(TOKENS, np.array([100.0, 300.0]), np.array([10.0, 20.0]))
    assert axis.at(np.array([0.0, 5.0, 15.0, 20.0, 30.0])).tolist() == [0, 50, 200, 300, 450]


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
