"""Controllers: weights that are decided during the run from losses.

A controller looks at the losses of a horizon and proposes shares. `WeightControl` collects the
losses, keeps the shares within floors, caps and ``max_epochs``, and appends them to an
`AdaptiveBlend`:

- Horizons 0 and 1 have the weights of the schedule's knot.
- The weights of horizon h are decided when horizon h - 2 is consumed, from losses up to there. They
  are known one horizon before they are used, so that batches can be loaded ahead. If the horizon is
  no multiple of the batch, a decision is made after the iteration that completes it.

There are three controllers:

- `OnlineDataMixing` (``odm``): Albalak et al., "Efficient Online Data Mixing For Language Model
  Pre-Training", arXiv 2312.02406.
- `DynamicBatchLoading` (``shearing``): Xia et al., "Sheared LLaMA", arXiv 2310.06694.
- ``replay``: the recorded decisions of another run. It draws the same samples as that run.

Decisions follow from the losses, which are equal on all ranks, in deterministic arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import (
    Field,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from typing_extensions import NotRequired, TypedDict

from megatron_chatflow.blend.adaptive import FORMAT_VERSION, AdaptiveBlend
from megatron_chatflow.blend.quota import GRID, GRID_BITS
from megatron_chatflow.blend.schedule import Positions, Schedule
from megatron_chatflow.config import ControllerConfig, RunConfig, to_plain
from megatron_chatflow.errors import UserError

PATH = "data.schedule.controller"
NUM_INITIAL = 2
"""Horizons with the weights of the knot."""
_LEAST_SHARE = 1e-12  # a share of 0 could not be raised to its floor
_Read = TypeVar("_Read")


class _RecordedController(TypedDict):
    """What `Controller.state` returns: nothing, or these of `OnlineDataMixing`."""

    rewards: NotRequired[list[FiniteFloat]]
    num_decisions: NotRequired[NonNegativeInt]


class _RecordedControl(TypedDict):
    """What `WeightControl.state` returns."""

    shares: list[NonNegativeFloat]
    sums: list[tuple[FiniteFloat, FiniteFloat]]
    validation: dict[str, FiniteFloat]
    controller: _RecordedController


class _RecordedSegment(TypedDict):
    schedule: dict[str, Any]


class _RecordedBlend(TypedDict):
    """The part of a blend's state that is compared with the configuration."""

    sources: list[str]
    horizon: PositiveInt
    segments: Annotated[list[_RecordedSegment], Field(min_length=1)]
    controller: dict[str, Any]


_CONTROL = TypeAdapter(_RecordedControl)
_BLEND = TypeAdapter(_RecordedBlend)


def _read(adapter: TypeAdapter[_Read], state: Mapping[str, Any], place: str) -> _Read:
    """Checks the types of a recorded state; ``place`` is the path of its keys."""
    try:
        return adapter.validate_python(dict(state))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        keys = ".".join(str(key)[:40] for key in problem["loc"])
        raise _damaged(f"{place}{keys}: {problem['msg'][:120]}") from None


def _damaged(what: str) -> UserError:
    return UserError(f"blend state: {what}: the checkpoint's state is damaged; load another one")


@dataclass(frozen=True)
class Decisions:
    """All decisions of a run."""

    folder: Path  # the checkpoint, or the run without one
    sources: tuple[str, ...]
    horizon: int  # samples per horizon
    weights: list[list[int]]  # weights of every horizon by source, which sum to 2**32


class Controller(Protocol):
    """Proposes the shares of the sources that have weight in the knot."""

    def propose(
        self,
        shares: Sequence[float],
        training: Sequence[float | None],
        validation: Sequence[float | None],
    ) -> list[float]:
        """Proposes the next shares; called once per horizon.

        Args:
            shares: The shares decided last, which sum to 1.
            training: Mean training loss of each source since the last call, in nats; None without
                loss tokens.
            validation: The last validation loss of each source since the last call; None without.

        Returns:
            A share of at least 0 for each source; they need not sum to 1.
        """

    def state(self) -> dict[str, Any]:
        """Returns the state as JSON, for the constructor."""


class OnlineDataMixing:
    """Online data mixing: EXP3 over the sources, with the training loss as reward.

    Decision t = 1, 2, ... of K sources:

    - ``R_i = smoothing * R_i + (1 - smoothing) * L_i``, from R_i = 0. The paper divides the summed
      loss of the samples drawn from i by its share. The blend draws exactly that share, so this is
      the mean loss L_i. A source without loss tokens keeps its R_i.
    - ``e_t = min(1 / K, sqrt(ln K / (K t)))``, with ``e_0 = 1 / K``
    - ``share_i = (1 - K e_t) * exp(e_{t-1} R_i) / sum_j exp(e_{t-1} R_j) + e_t``

    The shares are therefore equal up to decision ``K ln K``, and every share is at least e_t.
    """

    def __init__(self, num_sources: int, smoothing: float, state: Mapping[str, Any]) -> None:
        self._smoothing = smoothing
        self.rewards = [float(r) for r in state.get("rewards", [0.0] * num_sources)]
        self.num_decisions = int(state.get("num_decisions", 0))

    def exploration(self, decision: int) -> float:
        """Returns the exploration rate of a decision; decision 0 is the begin of the run."""
        number = len(self.rewards)
        if decision == 0:
            return 1 / number
        return min(1 / number, math.sqrt(math.log(number) / (number * decision)))

    def propose(
        self,
        shares: Sequence[float],
        training: Sequence[float | None],
        validation: Sequence[float | None],
    ) -> list[float]:
        """Proposes the next shares; see `Controller.propose`."""
        keep = self._smoothing
        self.rewards = [
            reward if loss is None else keep * reward + (1 - keep) * loss
            for reward, loss in zip(self.rewards, training, strict=True)
        ]
        before = self.exploration(self.num_decisions)
        self.num_decisions += 1
        rate = self.exploration(self.num_decisions)
        top = max(self.rewards)
        powers = [math.exp(before * (reward - top)) for reward in self.rewards]
        left = 1 - len(powers) * rate
        return [left * power / sum(powers) + rate for power in powers]

    def state(self) -> dict[str, Any]:
        """Returns the state; see `Controller.state`."""
        return {"rewards": self.rewards, "num_decisions": self.num_decisions}


class DynamicBatchLoading:
    """Dynamic batch loading: more weight to sources whose loss is above its reference.

    After a validation, ``share_i = share_i * exp(max(l_i - reference_i, 0))``, normalized, where
    l_i is the validation loss of the source. Without a validation since the last decision, shares
    stay as they are.
    """

    def __init__(self, references: Sequence[float]) -> None:
        self._references = list(references)

    def propose(
        self,
        shares: Sequence[float],
        training: Sequence[float | None],
        validation: Sequence[float | None],
    ) -> list[float]:
        """Proposes the next shares; see `Controller.propose`."""
        excess = [
            0.0 if loss is None else max(loss - reference, 0.0)
            for loss, reference in zip(validation, self._references, strict=True)
        ]
        top = max(excess)  # a common factor, so that large losses do not overflow
        return [share * math.exp(e - top) for share, e in zip(shares, excess, strict=True)]

    def state(self) -> dict[str, Any]:
        """Returns the state; see `Controller.state`."""
        return {}


def bounded_shares(
    shares: Sequence[float], lows: Sequence[float], highs: Sequence[float]
) -> list[float]:
    """Returns the shares of sum 1 within bounds that are closest to ``shares``.

    All shares get a common factor and are then clipped to their bounds; the factor is the one with
    which they sum to 1. This minimizes the Kullback-Leibler divergence. The lows must not sum to
    more than 1, and the highs not to less.
    """
    parts = [max(share, _LEAST_SHARE) for share in shares]

    def clipped(factor: float) -> list[float]:
        scaled = zip(parts, lows, highs, strict=True)
        return [min(max(factor * part, low), high) for part, low, high in scaled]

    edges = sorted(
        bound / part for bounds in (lows, highs) for bound, part in zip(bounds, parts, strict=True)
    )
    # The sum grows linearly between two edges, by the parts that are not clipped.
    below = 0.0
    for edge in edges:
        if sum(clipped(edge)) >= 1:
            middle = (below + edge) / 2
            free = [
                k
                for k, part in enumerate(parts)
                if lows[k] <= middle * part <= highs[k] and lows[k] < highs[k]
            ]
            slope = sum(parts[k] for k in free)
            start = sum(clipped(below))
            factor = below + (1 - start) / slope if slope and start < 1 else below
            return clipped(min(factor, edge))
        below = edge
    return list(highs)


def integer_weights(shares: Sequence[float], most: Sequence[int]) -> list[int]:
    """Rounds shares of sum 1 to weights of sum 2**32, none above ``most``.

    The rest after rounding down goes to the sources with the most room.
    """
    weights = [min(int(share * GRID), limit) for share, limit in zip(shares, most, strict=True)]
    rest = GRID - sum(weights)
    for k in sorted(range(len(weights)), key=lambda k: weights[k] - most[k]):
        added = max(min(rest, most[k] - weights[k]), -weights[k])
        weights[k] += added
        rest -= added
    return weights


class WeightControl:
    """Decides the weights of an `AdaptiveBlend` from the losses of the run.

    Args:
        config: The settings of the controller.
        blend: The blend, new or resumed.
        allowed: The most draws of each source by its ``max_epochs``; None without a limit.
        num_samples: Samples in the whole run.
        state: A state that `state` returned; empty for a new run.
    """

    def __init__(
        self,
        config: ControllerConfig,
        blend: AdaptiveBlend,
        allowed: Sequence[int | None],
        num_samples: int,
        state: Mapping[str, Any],
    ) -> None:
        self.config = config
        self.blend = blend
        self._allowed = list(allowed)
        self._num_samples = num_samples
        names = blend.sources
        initial = blend.schedule.weights(0).tolist()
        self._active = [k for k, weight in enumerate(initial) if weight]
        self._lows, self._highs = (
            [bound.get(names[k], default) for k in self._active]
            for bound, default in (
                (_by_source(config.floor, names), 0.0),
                (_by_source(config.cap, names), 1.0),
            )
        )
        self._shares = [initial[k] / GRID for k in self._active]
        # Summed loss and loss tokens of each source since the last decision.
        self._sums = np.zeros((len(names), 2))
        self._validation: dict[str, float] = {}
        inner: _RecordedController = {}
        if state:
            recorded = _read(_CONTROL, state, "controller.")
            inner = recorded["controller"]
            lengths = {len(recorded["shares"]), len(inner.get("rewards", self._active))}
            if lengths != {len(self._active)} or len(recorded["sums"]) != len(names):
                raise _damaged("controller: has numbers of another number of sources")
            self._shares, self._validation = recorded["shares"], recorded["validation"]
            self._sums = np.array(recorded["sums"], np.float64)
        self._controller = self._build(inner)
        while blend.num_decided < NUM_INITIAL:
            blend.append(self._within_bounds(self._shares))

    def __str__(self) -> str:
        """Returns one line that describes the decisions."""
        horizon, names = self.blend.horizon, self.blend.sources
        bounds = ", ".join(
            f"{names[k]} {low:g} to {high:g}"
            for k, low, high in zip(self._active, self._lows, self._highs, strict=True)
        )
        return (
            f"{self.config.name} decides the weights of {', '.join(names[k] for k in self._active)}"
            f" every {horizon:,} samples, {horizon:,} samples ahead; bounds: {bounds}; the weights "
            f"of the first {self.blend.decided_samples:,} samples are decided"
        )

    def _build(self, state: Mapping[str, Any]) -> Controller:
        if self.config.name == "odm":
            return OnlineDataMixing(len(self._active), self.config.smoothing, state)
        references = self.config.reference_loss or {}
        return DynamicBatchLoading([references[self.blend.sources[k]] for k in self._active])

    def observe(self, sums: npt.NDArray[np.float64]) -> None:
        """Adds the losses of an iteration with an update.

        ``sums`` are the summed loss and the loss tokens of each source, float64[num_sources, >=2].
        """
        self._sums += sums[:, :2]

    def observe_validation(self, losses: Mapping[str, float]) -> None:
        """Replaces the validation losses, in nats by source."""
        self._validation = {name: loss for name, loss in losses.items() if math.isfinite(loss)}

    def is_due(self, consumed_samples: int) -> bool:
        """Returns whether the weights of a horizon have to be decided after so many samples."""
        return self.blend.num_decided < consumed_samples // self.blend.horizon + NUM_INITIAL

    def propose(self) -> tuple[list[int], dict[str, Any]]:
        """Proposes the weights of the next horizon; `adopt` makes them the decision.

        Returns:
            The weights, int[num_sources] of sum 2**32, and the state after the decision.

        Raises:
            UserError: No source may be drawn any more.
        """
        names = [self.blend.sources[k] for k in self._active]
        training = [
            self._sums[k, 0] / self._sums[k, 1] if self._sums[k, 1] else None for k in self._active
        ]
        validation = [self._validation.get(name) for name in names]
        self._shares = self._controller.propose(self._shares, training, validation)
        weights = self._within_bounds(self._shares)
        self._shares = [weights[k] / GRID for k in self._active]
        self._sums[:] = 0
        self._validation = {}
        return weights, self.state()

    def adopt(self, weights: Sequence[int], state: Mapping[str, Any]) -> dict[str, Any]:
        """Makes a proposal of any rank the decision; returns its record for the metrics."""
        self._shares = [float(share) for share in state["shares"]]
        self._controller = self._build(state["controller"])
        self.blend.append(weights)
        return self.record(self.blend.num_decided - 1)

    def record(self, number: int) -> dict[str, Any]:
        """Returns the decision of a horizon as JSON."""
        begin = number * self.blend.horizon
        weights = self.blend.weights(begin).tolist()
        return {
            "controller": self.config.name,
            "horizon": number,
            "begin": begin,
            "end": begin + self.blend.horizon,
            "weights": dict(zip(self.blend.sources, weights, strict=True)),
        }

    def state(self) -> dict[str, Any]:
        """Returns the state for a checkpoint, as JSON."""
        return {
            "name": self.config.name,
            "shares": self._shares,
            "sums": self._sums.tolist(),
            "validation": self._validation,
            "controller": self._controller.state(),
        }

    def _within_bounds(self, shares: Sequence[float]) -> list[int]:
        """Returns the weights of the next horizon within floors, caps and ``max_epochs``."""
        begin = self.blend.num_decided * self.blend.horizon
        quotas = self.blend.quotas(begin)
        # A source is never a whole sample ahead of its quota, so a quota within the limit at the
        # end of the horizon keeps the count within it.
        left = self._num_samples - begin
        most = self._limits(quotas, self.blend.horizon)
        if sum(most) < GRID and left < self.blend.horizon:
            # The run ends before the horizon does. Weights behind its end are drawn if a resume
            # extends it, so they use up what is left of all sources at the same time.
            most = self._limits(quotas, left if left > 0 else self._num_left(quotas))
        if sum(most) < GRID:
            raise UserError(
                f"data.sources: every source reaches its max_epochs after sample {begin}; raise "
                "one, or train fewer samples"
            )
        highs = [most[k] / GRID for k in self._active]
        # `max_epochs` wins over caps where these leave nothing to draw, and always over floors.
        capped = [min(high, cap) for high, cap in zip(highs, self._highs, strict=True)]
        if math.fsum(capped) >= 1 - 1e-9:
            highs = capped
        lows = [min(low, high) for low, high in zip(self._lows, highs, strict=True)]
        bounded = bounded_shares(shares, lows, highs)
        full = [0.0] * len(quotas)
        for k, share in zip(self._active, bounded, strict=True):
            full[k] = share
        return integer_weights(full, most)

    def _limits(self, quotas: Sequence[int], num_samples: int) -> list[int]:
        """Returns the largest weights with which the next samples stay within ``max_epochs``."""
        most = [0] * len(quotas)
        for k in self._active:
            limit, most[k] = self._allowed[k], GRID
            if limit is not None and num_samples:
                most[k] = min(GRID, max((limit << GRID_BITS) - quotas[k], 0) // num_samples)
        return most

    def _num_left(self, quotas: Sequence[int]) -> int:
        """Returns for how many samples all sources together suffice; one less than they have."""
        left = [max(((self._allowed[k] or 0) << GRID_BITS) - quotas[k], 0) for k in self._active]
        return max((sum(left) >> GRID_BITS) - 1, 0)


def _by_source(bound: float | Mapping[str, float], names: Sequence[str]) -> Mapping[str, float]:
    return bound if isinstance(bound, Mapping) else dict.fromkeys(names, bound)


def controlled_blend(
    config: RunConfig,
    recorded: Mapping[str, Any] | None = None,
    state: Mapping[str, Any] | None = None,
    decisions: Decisions | None = None,
) -> AdaptiveBlend:
    """Creates the blend of a run with a controller.

    Args:
        config: The configuration, which has a controller.
        recorded: The schedule in the checkpoint; None for a new run.
        state: The state of the blend in the checkpoint; None for a new run.
        decisions: What a new run replays; None for other controllers.

    Raises:
        UserError: A resumed run has another controller, horizon, knot or sources, the state is
            damaged, or the sources are not those of the decisions.
    """
    controller = config.data.schedule.controller
    assert controller is not None, "checked by the caller"
    names = list(config.data.sources)
    block = to_plain(config.data.schedule)
    batch = config.train.global_batch_size
    if recorded is not None:
        batch = Schedule.from_dict(recorded).samples_per_iteration
    schedule = Schedule.from_dict(block, names, batch, config.data.seq_length)
    if state is None and decisions is not None:
        if list(decisions.sources) != names:
            raise UserError(
                f"data.sources: {decisions.folder} has the sources {', '.join(decisions.sources)}, "
                "and a replay needs the same ones in the same order"
            )
        blend = AdaptiveBlend(schedule, decisions.horizon)
        for row in decisions.weights:
            blend.append(row)
        blend.complete()
        return blend
    if state is not None:
        if state.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{PATH}: the checkpoint's run has none, and a run cannot get one when it is "
                "resumed; start a new run from its weights with --finetune and another --save"
            )
        read = _read(_BLEND, state, "")
        _check_unchanged(controller, schedule, read)
        horizon = read["horizon"]
    if controller.name != "replay":
        assert controller.horizon is not None, "checked by the configuration"
        positions = Positions(schedule.unit, batch, 0, config.data.seq_length)
        given = positions.to_sample(controller.horizon, f"{PATH}.horizon")
        if state is not None and given != horizon:
            raise UserError(
                f"{PATH}.horizon: {given} samples here and {horizon} in the checkpoint; the "
                "horizon of a run cannot change"
            )
        horizon = given
        if horizon < config.train.global_batch_size:
            raise UserError(
                f"{PATH}.horizon: {horizon} samples are less than one global batch of "
                f"{config.train.global_batch_size}; raise it"
            )
    blend = AdaptiveBlend(schedule, horizon, state=state)
    if controller.name == "replay":
        blend.complete()
    return blend


def _check_unchanged(
    controller: ControllerConfig, schedule: Schedule, state: _RecordedBlend
) -> None:
    """Raises `UserError` if a resume changes the controller, the sources or the knot."""
    name = state["controller"].get("name")
    if name != controller.name:
        raise UserError(
            f"{PATH}.name: {controller.name} here and {name} in the checkpoint; the controller of "
            "a run cannot change"
        )
    if state["sources"] != list(schedule.sources):
        raise UserError(
            "data.sources: a run with a controller keeps its sources and their order; the "
            f"checkpoint has {', '.join(state['sources'])}"
        )
    was = Schedule.from_dict(state["segments"][0]["schedule"])
    if was.weights(0).tolist() != schedule.weights(0).tolist():
        raise UserError(
            "data.schedule.knots: the weights of a run with a controller cannot be edited; "
            "restore the knot that it started with"
        )


def refuse_missing_controller(state: Mapping[str, Any]) -> None:
    """Raises `UserError` if a run without a controller would resume one with a controller."""
    if state.get("format_version") == FORMAT_VERSION:
        found = state.get("controller")
        name = found.get("name") if isinstance(found, Mapping) else None
        raise UserError(
            f"{PATH}: is missing, but the checkpoint's run has the controller {name}; restore it. "
            "For fixed weights, start a new run from its weights (--finetune) with the schedule "
            "that plan_blend.py --from-run prints"
        )


def fixed_schedule(
    sources: Sequence[str],
    horizon: int,
    decisions: Sequence[Sequence[int]],
    objective_weights: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Returns the ``data.schedule`` block with the weights of recorded decisions.

    Weights are integers of sum 2**32, so the block has exactly these weights. They apply at the
    samples of the decisions if the batch divides the horizon, and otherwise from the first
    iteration on that begins in a horizon. Every knot gets the ``objective_weights`` of the run's
    knot.
    """
    more = {"objective_weights": dict(objective_weights)} if objective_weights else {}
    knots: list[dict[str, Any]] = []
    for number, row in enumerate(decisions):
        weights = {name: weight for name, weight in zip(sources, row, strict=True) if weight}
        if not knots or knots[-1]["weights"] != weights:
            knots.append({"at": number * horizon, "weights": weights, **more})
    return {"unit": "samples", "knots": knots}
