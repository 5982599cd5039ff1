"""Judges every step before its update: is its loss finite, its gradient finite, its loss a spike?

Every rank judges by the same numbers, the loss of each source and the norm of the gradient, so all
ranks reach the same `Verdict`. What later verdicts depend on is part of every checkpoint.

The judgement falls between the gradient's norm and the update, so a bad step leaves weights and
optimizer state as they were. The same holds for a step without loss tokens. Its gradient is zero,
but its update would still decay the weights and move them by the optimizer's moments. Such a step
is not a fault: whatever ``--on-nan`` says, its update is left out and counted, and it neither
counts as one of the bad steps in a row nor enters the losses that a spike is measured against. As
in every other step, the iteration, the consumed samples and the learning rate's position go on.
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

_FEWEST_LOSSES = 10  # a median of fewer says little


@dataclass(frozen=True)
class Verdict:
    """What was found of a step.

    Attributes:
        problem: What is wrong with it; None where nothing is.
        has_loss_tokens: Whether any token of the global batch had a loss.
    """

    problem: str | None
    has_loss_tokens: bool = True

    @property
    def is_good(self) -> bool:
        """Whether the update may be made."""
        return self.problem is None and self.has_loss_tokens


class Guard:
    """Remembers recent losses, judges steps and counts the bad ones.

    Attributes:
        num_skipped: Bad steps, whose updates were left out, since the run began.
        skipped_no_loss_tokens: Steps without loss tokens, whose updates were left out as well.
        num_rollbacks: How often the weights of a checkpoint were taken again.
    """

    def __init__(self, config: RunConfig, sources: Sequence[str], state: Mapping[str, Any]) -> None:
        """Goes on where a checkpoint left it.

        Args:
            config: The run's; its ``faults`` section says what to do.
            sources: Their names, for messages.
            state: What `state` gave; empty at the begin of a run.
        """
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
        """What a checkpoint carries; JSON can hold it."""
        return {
            "num_skipped": self.num_skipped,
            "skipped_no_loss_tokens": self.skipped_no_loss_tokens,
            "num_rollbacks": self.num_rollbacks,
            "num_in_a_row": self._num_in_a_row,
            "losses": list(self._losses) if self._faults.loss_spike_factor is not None else [],
        }

    def judge(self, source_sums: Sequence[Sequence[float]], grad_norm: float) -> Verdict:
        """Judges a step; changes nothing.

        Args:
            source_sums: Loss, loss tokens and bytes of each source over the global batch.
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
            return Verdict(f"the gradient's norm is {grad_norm}")
        num_tokens = sum(row[1] for row in source_sums)
        if not num_tokens:
            return Verdict(None, has_loss_tokens=False)
        loss = sum(row[0] for row in source_sums) / num_tokens
        factor = self._faults.loss_spike_factor
        if factor is not None and len(self._losses) >= _FEWEST_LOSSES:
            usual = median(self._losses)
            if loss > factor * usual:
                return Verdict(
                    f"the loss {loss:.4f} is above {factor:g} times the recent median {usual:.4f}"
                )
        return Verdict(None)

    def record(self, verdict: Verdict, loss: float | None, begin: int, end: int) -> bool:
        """Counts a judged step.

        Args:
            verdict: What `judge` found.
            loss: The step's mean loss; None if it had no loss tokens.
            begin: First global sample of the step.
            end: The one after its last.

        Returns:
            Whether the weights are to be rolled back now.

        Raises:
            UserError: The run is to stop here.
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
                    "samples %d to %d: no loss tokens; the update is left out. Further such steps "
                    "are counted as skipped_no_loss_tokens",
                    begin,
                    end,
                )
            return False
        where = f"samples {begin} to {end}: {verdict.problem}"
        if self._faults.on_nan == "stop":
            raise UserError(
                f"{where}; the update was not made. Resume from the last checkpoint with a lower "
                "--lr, or with --on-nan skip or rollback"
            )
        self._num_in_a_row += 1
        self.num_skipped += 1
        if self._num_in_a_row >= self._faults.max_bad_steps:
            raise UserError(
                f"{where}; {self._num_in_a_row} bad steps in a row (--max-bad-steps). Resume from "
                "an earlier checkpoint with a lower --lr"
            )
        logger.warning("%s; the update is left out (%d so far)", where, self.num_skipped)
        if self._faults.on_nan == "skip":
            return False
        self.num_rollbacks += 1
        return True


class GuardedOptimizer:
    """megatron-core's optimizer whose update waits for a judgement.

    Its ``step`` computes the gradient's norm, clips, and then calls ``step_with_ready_grads`` on
    itself; these two methods are what this class puts itself between, on the one object.
    """

    def __init__(self, optimizer: Any) -> None:
        """Takes the two methods over."""
        self._optimizer = optimizer
        self._norm = optimizer.get_grad_norm
        self._update = optimizer.step_with_ready_grads
        self._judge: Callable[[float], Verdict] = _find_good
        self._grad_norm = math.nan
        self._verdict = Verdict(None)
        optimizer.get_grad_norm = self._get_grad_norm
        optimizer.step_with_ready_grads = self._step_with_ready_grads

    def step(self, judge: Callable[[float], Verdict]) -> tuple[Verdict, float]:
        """Takes the step if ``judge(grad_norm)`` finds it good.

        Returns:
            The verdict, and the gradient's norm before clipping.
        """
        self._judge = judge
        try:
            self._optimizer.step()
        finally:
            self._judge = _find_good
        return self._verdict, self._grad_norm

    def _get_grad_norm(self) -> Any:
        norm = self._norm()
        self._grad_norm = float(norm)
        return norm

    def _step_with_ready_grads(self) -> bool:
        self._verdict = self._judge(self._grad_norm)
        return bool(self._update()) if self._verdict.is_good else False


def _find_good(_grad_norm: float) -> Verdict:
    return Verdict(None)
