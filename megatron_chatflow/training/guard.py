"""Judges every step before its update: non-finite or large losses and gradients.

Every rank judges the same numbers, the loss of each source and the norm of the gradient, so all
ranks reach the same `Verdict`. The state that later verdicts depend on is part of every checkpoint.

A bad step leaves weights and optimizer state unchanged. So does a step without loss tokens: its
gradient is zero, but the update would still decay the weights and move them by the optimizer's
moments. Such a step is not a fault: whatever ``--on-nan`` says, its update is skipped and counted,
and it is neither one of the bad steps in a row nor used to detect spikes. As after any other step,
the iteration, the consumed samples and the learning-rate schedule advance.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from megatron_chatflow.config import RunConfig
from megatron_chatflow.errors import UserError

logger = logging.getLogger(__name__)

_MIN_LOSSES = 10  # a median of fewer losses is unreliable


@dataclass(frozen=True)
class Verdict:
    """Judgement of a step."""

    problem: str | None  # description of the fault; None if there is none
    has_loss_tokens: bool = True  # whether any token of the global batch has a loss

    @property
    def is_good(self) -> bool:
        """Whether the update is made."""
        return self.problem is None and self.has_loss_tokens


class Guard:
    """Judges steps by their own values and by recent losses, and counts bad steps.

    The counters ``num_skipped`` (bad steps), ``skipped_no_loss_tokens`` and ``num_rollbacks`` count
    from the beginning of the run.
    """

    def __init__(self, config: RunConfig, sources: Sequence[str], state: Mapping[str, Any]) -> None:
        """Initializes the guard with the return value of `state`, which is empty for a new run."""
        self._faults = config.faults
        self._sources = list(sources)
        self.num_skipped = int(state.get("num_skipped", 0))
        self.skipped_no_loss_tokens = int(state.get("skipped_no_loss_tokens", 0))
        self.num_rollbacks = int(state.get("num_rollbacks", 0))
        self._num_in_a_row = int(state.get("num_in_a_row", 0))
        self._losses = deque(
            map(float, state.get("losses", ())), maxlen=self._faults.loss_spike_window
        )

    def state(self) -> dict[str, Any]:
        """Returns the state for a checkpoint, as JSON."""
        return {
            "num_skipped": self.num_skipped,
            "skipped_no_loss_tokens": self.skipped_no_loss_tokens,
            "num_rollbacks": self.num_rollbacks,
            "num_in_a_row": self._num_in_a_row,
            "losses": list(self._losses) if self._faults.loss_spike_factor is not None else [],
        }

    def judge(self, source_sums: Sequence[Sequence[float]], grad_norm: float) -> Verdict:
        """Judges a step without recording it.

        Args:
            source_sums: Summed loss, loss tokens and bytes of each source over the global batch.
            grad_norm: Norm of the whole gradient before clipping.
        """
        bad = [
            name
            for name, row in zip(self._sources, source_sums, strict=True)
            if not math.isfinite(row[0])
        ]
        if bad:
            return Verdict(f"the loss is not finite (source {', '.join(bad)})")
        if not math.isfinite(grad_norm):
            return Verdict(f"the gradient norm is {grad_norm}")
        num_tokens = sum(row[1] for row in source_sums)
        if not num_tokens:
            return Verdict(None, has_loss_tokens=False)
        limit = self._faults.grad_norm_limit
        if limit is not None and grad_norm > limit:
            return Verdict(
                f"the gradient norm {grad_norm:.4g} is above --grad-norm-limit {limit:g}"
            )
        loss = sum(row[0] for row in source_sums) / num_tokens
        factor = self._faults.loss_spike_factor
        if factor is not None and len(self._losses) >= _MIN_LOSSES:
            usual = median(self._losses)
            if loss > factor * usual:
                return Verdict(
                    f"the loss {loss:.4f} is above {factor:g} times the recent median {usual:.4f}"
                )
        return Verdict(None)

    def record(self, verdict: Verdict, loss: float | None, begin: int, end: int) -> bool:
        """Records the verdict of a step of the global samples [begin, end).

        ``loss`` is the step's mean loss, None without loss tokens.

        Returns:
            Whether the weights must be rolled back now.

        Raises:
            UserError: The verdict ends the run.
        """
        if verdict.is_good:
            self._num_in_a_row = 0
            if loss is not None:
                self._losses.append(loss)
            return False
        if verdict.problem is None:
            self.skipped_no_loss_tokens += 1
            if self.skipped_no_loss_tokens == 1:
                logger.warning(
                    "samples %d to %d: no loss tokens; the update is skipped. Further such "
                    "steps are only counted, in skipped_no_loss_tokens",
                    begin,
                    end,
                )
            return False
        where = f"samples {begin} to {end}: {verdict.problem}"
        if self._faults.on_nan == "stop":
            raise UserError(
                f"{where}; the update was not applied. Resume from the last checkpoint with a "
                "lower --lr, or with --on-nan skip or rollback"
            )
        self._num_in_a_row += 1
        self.num_skipped += 1
        if self._num_in_a_row >= self._faults.max_bad_steps:
            raise UserError(
                f"{where}; {self._num_in_a_row} bad steps in a row (--max-bad-steps). Resume from "
                "an earlier checkpoint with a lower --lr"
            )
        logger.warning("%s; the update is skipped (%d so far)", where, self.num_skipped)
        if self._faults.on_nan == "skip":
            return False
        self.num_rollbacks += 1
        return True


class GuardedOptimizer:
    """Wraps megatron-core's optimizer so that a step is judged before its update.

    ``optimizer.step`` computes the gradient norm, clips, and then calls ``step_with_ready_grads``
    on itself. This class replaces both methods on that one object.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._norm = optimizer.get_grad_norm
        self._update = optimizer.step_with_ready_grads
        self._judge: Callable[[float], Verdict] = _find_good
        # called before every judgement, when the gradients are reduced and not yet clipped
        self.on_gradients: Callable[[], None] = lambda: None
        self._grad_norm = math.nan
        self._verdict = Verdict(None)
        optimizer.get_grad_norm = self._get_grad_norm
        optimizer.step_with_ready_grads = self._step_with_ready_grads

    def step(self, judge: Callable[[float], Verdict]) -> tuple[Verdict, float]:
        """Makes the update if ``judge(grad_norm)`` returns a good verdict.

        Returns the verdict, and the gradient norm before clipping.
        """
        self._judge = judge
        try:
            self._optimizer.step()
        finally:
            self._judge = _find_good
        return self._verdict, self._grad_norm

    def _get_grad_norm(self) -> Any:
        self.on_gradients()
        norm = self._norm()
        self._grad_norm = float(norm)
        return norm

    def _step_with_ready_grads(self) -> bool:
        self._verdict = self._judge(self._grad_norm)
        return bool(self._update()) if self._verdict.is_good else False


def _find_good(_grad_norm: float) -> Verdict:
    return Verdict(None)
