"""Axes: from values to pixels, round tick positions, and numbers as people write them.

In: limits of the data. Out: `Scale` objects and short labels.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from megatron_chatflow.evaluation.report_data import FloatArray


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic map of [low, high] to pixels [begin, end].

    Attributes:
        low: Value at pixel `begin`.
        high: Value at pixel `end`.
        begin: Pixel of `low`.
        end: Pixel of `high`.
        log: Whether the map is logarithmic; `low` is then positive.
    """

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def pixels(self, values: FloatArray) -> FloatArray:
        """Pixels of `values` (float64[n]); NaN stays NaN, as does a value <= 0 on a log axis."""
        low, high, mapped = self.low, self.high, values
        if self.log:
            low, high = math.log10(low), math.log10(high)
            mapped = np.log10(np.where(values > 0, values, np.nan))
        return self.begin + (mapped - low) / (high - low) * (self.end - self.begin)

    def ticks(self, target: int = 5) -> list[float]:
        """About `target` round values within the limits."""
        if self.log:
            return _log_ticks(self.low, self.high)
        step = nice_step((self.high - self.low) / target)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def nice_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5 or 5 x 10^k that is not below `rough`."""
    magnitude = 10.0 ** math.floor(math.log10(rough))
    for factor in (1.0, 2.0, 2.5, 5.0, 10.0):
        if factor * magnitude >= rough * (1 - 1e-9):
            return factor * magnitude
    return 10.0 * magnitude


def fit(
    curves: Iterable[FloatArray],
    begin: float,
    end: float,
    *,
    from_zero: bool = False,
    log: bool = False,
    margin: float = 0.06,
) -> Scale:
    """A scale that holds every finite value of `curves`, with a margin.

    Args:
        curves: float64 arrays, NaN for gaps.
        begin: Pixel of the lower limit.
        end: Pixel of the upper limit.
        from_zero: Begin at 0 when no value is negative.
        log: Logarithmic.
        margin: Free part of the span at each end that is not 0.

    Returns:
        The scale; [0, 1] or its like where there is nothing to hold.
    """
    values = np.concatenate([np.ravel(curve) for curve in curves] or [np.empty(0)])
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    if not len(values):
        return Scale(0.1 if log else 0.0, 1.0, begin, end, log)
    low, high = float(values.min()), float(values.max())
    if log:
        spread = max((high / low) ** margin, 1.1)
        return Scale(low / spread, high * spread, begin, end, True)
    if from_zero and low >= 0:
        low = 0.0
    if high == low:
        half = abs(high) * 0.1 or 0.5
        low, high = (0.0 if from_zero and low >= 0 else low - half), high + half
    span = high - low
    lower = low if low == 0.0 and from_zero else low - margin * span
    return Scale(lower, high + margin * span, begin, end)


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within the limits, with 2 and 5 between them where there are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [f * 10.0**k for k in exponents for f in factors if low <= f * 10.0**k <= high]
        if len(ticks) >= 4:
            break
    if len(ticks) > 8:
        ticks = ticks[:: math.ceil(len(ticks) / 8)]
    return ticks


def format_value(value: float, digits: int = 4) -> str:
    """A number in `digits` significant digits, as in 12.35, 1.204M or 3e-05; a dash for NaN."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    for suffix, unit in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if size >= unit * (10 if suffix == "K" else 1) * (1 - 1e-9):
            return f"{value / unit:.{digits}g}{suffix}".replace("-", "−")
    if size < 1e-3:
        mantissa, exponent = f"{value:.{max(digits - 2, 0)}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    if size >= 1000:
        return f"{value:,.0f}".replace("-", "−")
    return f"{value:.{digits}g}".replace("-", "−")


def format_percent(value: float) -> str:
    """A fraction as a percentage with at most one decimal."""
    return "–" if not math.isfinite(value) else f"{100 * value:.1f}".removesuffix(".0") + " %"


def format_duration(seconds: float) -> str:
    """A time in the two largest units that say something: 8.2 s, 3 min 20 s, 5 h 2 min, 3 d 4 h."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{max(seconds, 0.0):.1f}".removesuffix(".0") + " s"
    whole = round(seconds)
    for unit, size, below, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if whole >= size:
            return f"{whole // size:,} {unit} {whole % size // part} {below}"
    return f"{whole // 60} min {whole % 60} s"
