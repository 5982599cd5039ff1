"""The learning rate of every iteration in closed form.

Training uses megatron-core's scheduler, which counts one step after another; a test compares the
two at every step. This form needs neither torch nor an optimizer, and answers for many iterations
at once: for plans, and for the change of the rate on a resume.

WSD (warmup, stable, decay): Hu et al., "MiniCPM", 2024. ``minus_sqrt``: Hagele et al., "Scaling
Laws and Compute-Optimal Training Beyond Fixed Training Durations", 2024.
"""

import numpy as np
import numpy.typing as npt

from megatron_chatflow.config.run_length import RunLength
from megatron_chatflow.config.sections import OptimizerConfig


def learning_rates(
    optimizer: OptimizerConfig, length: RunLength, positions: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Computes the learning rate of the iterations after some positions.

    Args:
        optimizer: Settings of the optimizer.
        length: The length of the run.
        positions: int64[n], positions in the schedule, see `RunLength.lr_position`.

    Returns:
        float64[n].
    """
    top, low, first = optimizer.lr, optimizer.min_lr, optimizer.lr_warmup_init
    warmup, decay = length.lr_warmup, max(length.lr_decay - length.lr_start, length.lr_warmup + 1)
    place = positions.astype(np.float64)
    if optimizer.lr_decay_style == "constant":
        rates = np.full_like(place, top)
    elif optimizer.lr_decay_style == "inverse-square-root":
        rates = np.maximum(low, top * max(warmup, 1) ** 0.5 / np.maximum(place, 1) ** 0.5)
    else:
        rates = low + (top - low) * _coefficients(optimizer, length, place, decay)
    if optimizer.lr_decay_style != "constant":
        rates = np.where(place > decay, low, rates)
    if warmup:
        rates = np.where(place <= warmup, first + (top - first) * (place / warmup), rates)
    return rates


def _coefficients(
    optimizer: OptimizerConfig, length: RunLength, place: npt.NDArray[np.float64], decay: int
) -> npt.NDArray[np.float64]:
    """Returns how much of the range above the minimum is left, between 1 and 0."""
    style: str = optimizer.lr_decay_style
    part = decay - length.lr_warmup
    if style == "WSD":
        style, part = optimizer.lr_wsd_decay_style, length.lr_wsd_decay
    done = np.clip((place - (decay - part)) / part, 0.0, 1.0)
    if style == "linear":
        return np.asarray(1.0 - done)
    if style == "cosine":
        return np.asarray(0.5 * (np.cos(np.pi * done) + 1.0))
    if style == "exponential":
        return np.asarray(2.0 * 0.5**done - 1.0)
    return np.asarray(1.0 - np.sqrt(done))


def learning_rate(
    optimizer: OptimizerConfig, length: RunLength, iteration: int, consumed_samples: int
) -> float:
    """Returns the learning rate of the iteration after ``iteration``."""
    position = np.array([length.lr_position(iteration, consumed_samples)])
    return float(learning_rates(optimizer, length, position)[0])
