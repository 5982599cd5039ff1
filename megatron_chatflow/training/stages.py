"""Stages of training: what is trained from which sample on, and with which learning rate.

`StagePlan` is what the configuration asks for: the ranges of rows of each tensor that every stage
trains. It needs neither a model nor other ranks, so a dry run shows it.

`StagedOptimizer` applies it to megatron-core's model and optimizer. Gradient buffers and optimizer
are those of training everything, whatever a stage trains:

- Before the gradient norm is computed, the reduced gradients of what is frozen are set to 0, so
  that norm and clipping count the trained parameters only. Tensors that are wholly frozen do not
  even require gradients, where the layers and the gradient buffers allow it, so that the matrix
  products of their weight gradients are left out.
- During an update, the inner optimizer's groups list only what is trained: whole tensors, and
  views of the trained rows. What is frozen is not touched, neither weights nor master weights nor
  moments, so it keeps its bits whatever the moments and the weight decay are.

What begins to be trained in a stage begins like a new parameter: with moments of 0 and its own
number of updates, which corrects their bias (Kingma and Ba, "Adam", 2015, section 3). Otherwise its
first updates would follow gradients of an earlier stage, or be as large as (1 - beta1) / sqrt(1 -
beta2) learning rates and more, because the number of all updates corrects no bias any more.

The same groups carry learning-rate multipliers, ``decoupled_lr`` and ``no_weight_decay``.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from megatron_chatflow.blend.schedule import Positions
from megatron_chatflow.checkpoint.megatron import ParameterShard
from megatron_chatflow.checkpoint.state import initialize_state, main_parameters, single
from megatron_chatflow.config import OptimizerConfig, RunConfig, RunLength
from megatron_chatflow.config.learning_rate import learning_rates
from megatron_chatflow.config.stages import (
    ALL_ROWS,
    EMBEDDING,
    OUTPUT,
    Rows,
    merge_rows,
    select,
    selects_rows,
)
from megatron_chatflow.convert.shape import LlamaShape
from megatron_chatflow.convert.weight_map import placements
from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime.table import Row

logger = logging.getLogger(__name__)

_PATH = "train.stages"


@with_config(ConfigDict(strict=True, extra="forbid"))
class _RecordedStage(TypedDict):
    at: int
    sample: int
    trainable: list[str]
    lr_multipliers: dict[str, float]


@with_config(ConfigDict(strict=True, extra="forbid"))
class _Recorded(TypedDict):
    unit: str
    stages: list[_RecordedStage]
    started: list[tuple[int, int]]


_RECORDED = TypeAdapter(_Recorded)


@dataclass(frozen=True)
class Stage:
    """A stage with its beginning in samples."""

    at: int  # its beginning as written, in the plan's unit
    sample: int  # the first sample; it begins with the first iteration at or after it
    trainable: tuple[str, ...]  # selectors of what is trained
    lr_multipliers: Mapping[str, float]  # factors of the learning rate by selector

    @property
    def content(self) -> tuple[Any, ...]:
        """What the stage does, without its position."""
        return self.trainable, list(self.lr_multipliers.items())


TRAIN_EVERYTHING = Stage(0, 0, ("all",), {})


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of a tensor that are treated alike in a stage."""

    begin: int  # the first row
    end: int  # the row after the last
    is_trainable: bool
    lr_multiplier: float = 1.0  # factor of the learning rate
    is_decoupled: bool = False  # whether its learning rate is ``decoupled_lr``
    has_weight_decay: bool = True  # whether weight decay applies, as far as it does to the tensor
    first_update: int = 0  # number of the run's updates before it began to be trained


@dataclass(frozen=True)
class StagePlan:
    """The stages of a run, in order, on the tensors of its model."""

    unit: str  # the unit of `Stage.at`: samples, tokens or iterations
    stages: tuple[Stage, ...]  # at least one; the first one begins at sample 0
    shapes: Mapping[str, tuple[int, ...]]  # shapes of the tensors without padding, by name
    is_tied: bool  # whether the embedding is also the output layer
    new_rows: Rows | None  # rows of tokens that the tokenizer added; None if there are none
    optimizer: OptimizerConfig

    @property
    def is_trivial(self) -> bool:
        """Whether everything is always trained in the same way."""
        return (
            self.optimizer.decoupled_lr is None
            and not self.optimizer.no_weight_decay
            and all(stage.content == TRAIN_EVERYTHING.content for stage in self.stages)
        )

    def index_at(self, sample: int) -> int:
        """Returns the number of the stage of an iteration that begins at a sample."""
        begun = [number for number, stage in enumerate(self.stages) if stage.sample <= sample]
        return begun[-1] if begun else 0

    def select(self, selector: str, tensor: str) -> Rows | None:
        """Returns the rows of a tensor that a selector selects; None for none."""
        return select(selector, tensor, is_tied=self.is_tied, new_rows=self.new_rows)

    def trained_rows(self, index: int, tensor: str) -> tuple[Rows, ...]:
        """Returns the rows of a tensor that a stage trains, without padding, in order."""
        found = [self.select(selector, tensor) for selector in self.stages[index].trainable]
        num_rows = self.shapes[tensor][0]
        whole = merge_rows(rows for rows in found if rows is not None)
        cut = ((begin, min(end, num_rows)) for begin, end in whole)
        return tuple((begin, end) for begin, end in cut if begin < end)

    def segments(self, started: Sequence[tuple[int, int]], tensor: str) -> list[Segment]:
        """Returns the rows of a tensor in the last one of the stages that were started.

        Args:
            started: The number of each stage, and the number of updates before it.
            tensor: The name of the tensor.
        """
        index = started[-1][0]
        by_stage = [self.trained_rows(number, tensor) for number, _ in started]
        factors = [
            (rows, factor)
            for selector, factor in self.stages[index].lr_multipliers.items()
            if (rows := self.select(selector, tensor)) is not None
        ]
        num_rows = self.shapes[tensor][0]
        cuts = {0, num_rows}
        for rows in (*(one for ranges in by_stage for one in ranges), *(one for one, _ in factors)):
            cuts |= {min(row, num_rows) for row in rows}
        bounds = sorted(cuts)
        is_decoupled = self.optimizer.decoupled_lr is not None and tensor in (EMBEDDING, OUTPUT)
        decays = all(self.select(one, tensor) is None for one in self.optimizer.no_weight_decay)
        segments = []
        for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
            factor = next((f for rows, f in reversed(factors) if _has(rows, begin)), 1.0)
            first = None
            for ranges, (_, num_updates) in zip(reversed(by_stage), reversed(started), strict=True):
                if not any(_has(rows, begin) for rows in ranges):
                    break
                first = num_updates
            segments.append(
                Segment(begin, end, first is not None, factor, is_decoupled, decays, first or 0)
            )
        # Padding rows of the vocabulary have no gradient: they belong to the rows before them.
        segments[-1] = replace(segments[-1], end=ALL_ROWS[1])
        return segments

    def num_trained(self, index: int) -> int:
        """Returns the number of parameters that a stage trains."""
        return sum(
            (end - begin) * int(np.prod(shape[1:], dtype=np.int64))
            for tensor, shape in self.shapes.items()
            for begin, end in self.trained_rows(index, tensor)
        )

    def flops_per_token(self, index: int, full: int) -> int:
        """Returns the model FLOPs per token of a stage, of which training everything has ``full``.

        A parameter counts 6 of them (see `config.shape.flops_per_token`): 2 each in the forward
        pass, in the gradient of the input, which every layer needs to hand back, and in the
        gradient of the weight. A tensor of which nothing is trained needs no weight gradient. One
        of which some rows are trained has that of all rows.
        """
        frozen = (
            shape for tensor, shape in self.shapes.items() if not self.trained_rows(index, tensor)
        )
        return full - 2 * sum(int(np.prod(shape, dtype=np.int64)) for shape in frozen)

    def describe(self, index: int) -> str:
        """Describes a stage in one line."""
        stage, total = self.stages[index], sum(int(np.prod(s)) for s in self.shapes.values())
        factors = "".join(f"; {name} at {f:g} x lr" for name, f in stage.lr_multipliers.items())
        return (
            f"trains {', '.join(stage.trainable)}: {self.num_trained(index):,} of {total:,} "
            f"parameters{factors}"
        )

    def iterations(self, length: RunLength) -> list[tuple[int, int]]:
        """Returns the iterations before and up to the end of what is left of each stage."""
        begins = [_iterations_before(stage.sample, length) for stage in self.stages]
        return list(zip(begins, [*begins[1:], length.last_iteration], strict=True))

    def table(self, length: RunLength) -> list[Row]:
        """Returns a row for each stage, with the iterations that are left of it."""
        rows: list[Row] = []
        left = self.iterations(length)
        for index, (stage, (begin, end)) in enumerate(zip(self.stages, left, strict=True)):
            iterations = "none left" if stage.sample < length.consumed_samples else "none"
            if begin < end:
                iterations = f"{begin + 1:,} to {end:,}"
            factors = [f"{name} x {factor:g}" for name, factor in stage.lr_multipliers.items()]
            rows.append(
                {
                    "stage": index,
                    "from sample": f"{stage.sample:,}",
                    "iterations": iterations,
                    "trains": ", ".join(stage.trainable),
                    "parameters": f"{self.num_trained(index):,}",
                    "learning rate": ", ".join(factors) or "lr",
                }
            )
        return rows

    def record(self, started: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Returns the state for a checkpoint, as JSON; empty for a plan of a single plain stage."""
        if [stage.content for stage in self.stages] == [TRAIN_EVERYTHING.content]:
            return {}
        return {
            "unit": self.unit,
            "stages": [
                {
                    "at": stage.at,
                    "sample": stage.sample,
                    "trainable": list(stage.trainable),
                    "lr_multipliers": dict(stage.lr_multipliers),
                }
                for stage in self.stages
            ],
            "started": [list(pair) for pair in started],
        }


def _iterations_before(sample: int, length: RunLength) -> int:
    """Returns the iterations of the run before the first one that begins at or after a sample."""
    if sample <= length.consumed_samples:
        return length.iteration
    done = length.batch_sizes.whole_iterations(length.consumed_samples, sample)
    done += length.samples_after(min(done, length.remaining_iterations())) < sample
    return min(length.iteration + done, length.last_iteration)


def _has(rows: Rows, row: int) -> bool:
    return rows[0] <= row < rows[1]


def plan_stages(
    config: RunConfig, positions: Positions, vocab_size: int, new_rows: Rows | None
) -> StagePlan:
    """Resolves the stages of a configuration.

    Args:
        config: The configuration of the run.
        positions: Converts positions in the unit of ``data.schedule`` to samples.
        vocab_size: Vocabulary size of the model before padding.
        new_rows: Rows of tokens that the tokenizer added; None if there are none.

    Raises:
        UserError: A selector selects nothing in this model.
    """
    shape = LlamaShape.of(config.model, vocab_size)
    plan = StagePlan(
        unit=positions.unit,
        stages=tuple(
            Stage(
                stage.at,
                positions.to_sample(stage.at, f"{_PATH}[{number}]") if stage.at else 0,
                stage.trainable,
                stage.lr_multipliers,
            )
            for number, stage in enumerate(config.train.stages)
        )
        or (TRAIN_EVERYTHING,),
        shapes={
            rule.megatron.format(layer=layer): rule.shape(shape)
            for rule, layer in placements(shape)
        },
        is_tied=not shape.untie_embeddings_and_output_weights,
        new_rows=new_rows,
        optimizer=config.optimizer,
    )
    named = [(f"optimizer.no_weight_decay: {one}", one) for one in config.optimizer.no_weight_decay]
    for number, stage in enumerate(plan.stages):
        path = f"{_PATH}[{number}]"
        named += [(f"{path}.trainable: {one}", one) for one in stage.trainable]
        named += [(f"{path}.lr_multipliers: {one}", one) for one in stage.lr_multipliers]
    for where, selector in named:
        _check_selects(plan, where, selector)
    return plan


def _check_selects(plan: StagePlan, where: str, selector: str) -> None:
    if selector == "new_rows" and plan.new_rows is None:
        raise UserError(
            f"{where}: the vocabulary of this run has no new rows; set --embedding-init with an "
            "extended tokenizer, or the tokenizer without them as --old-tokenizer-model, or name "
            "the rows, such as rows.49152-"
        )
    found = {tensor: plan.select(selector, tensor) for tensor in plan.shapes}
    if not any(rows is not None and rows[0] < plan.shapes[t][0] for t, rows in found.items()):
        what = f"the vocabulary has {plan.shapes[EMBEDDING][0]} rows"
        if not selects_rows(selector):
            num_layers = sum(name.endswith("linear_fc2.weight") for name in plan.shapes)
            what = f"the model has {num_layers} layers, and names such as {list(plan.shapes)[1]}"
        raise UserError(f"{where}: selects nothing; {what}")


def check_edit(
    plan: StagePlan,
    recorded: Mapping[str, Any],
    consumed: int,
    at: object,
    recorded_rows: object = None,
) -> str:
    """Checks that a resumed run keeps the stages that have begun; returns what changes, or "".

    Args:
        plan: The stages of the configuration.
        recorded: What the checkpoint recorded, see `StagePlan.record`.
        consumed: Number of samples consumed before the checkpoint.
        at: The checkpoint, for messages.
        recorded_rows: The new rows of the vocabulary that the checkpoint recorded; None if it
            recorded none.

    Raises:
        UserError: A stage that has begun is different or selects other rows, a new one lies in the
            past, or the record is damaged.
    """
    old = _read(recorded, at)
    stages = [
        Stage(one["at"], one["sample"], tuple(one["trainable"]), one["lr_multipliers"])
        for one in old["stages"]
    ]
    num_begun = 1 + max((number for number, _ in old["started"]), default=-1)
    is_regrown = recorded_rows is not None and recorded_rows != list(plan.new_rows or ())
    for number, before in enumerate(stages[:num_begun]):
        now = plan.stages[number] if number < len(plan.stages) else None
        is_same = now is not None and (
            now.content == before.content
            and ((plan.unit, now.at) == (old["unit"], before.at) or now.sample == before.sample)
        )
        if not is_same:
            raise UserError(
                f"{_PATH}[{number}]: has begun before {at} and differs from it, where it is "
                f"at {before.at} {old['unit']} and trains {', '.join(before.trainable)}"
                f"{_shown_factors(before)}; restore it, and put changes into a later stage"
            )
        if is_regrown and "new_rows" in (*before.trainable, *before.lr_multipliers):
            raise UserError(
                f"{_PATH}[{number}]: has begun before {at} and selects new_rows, which are other "
                "rows after another growth of the vocabulary; start a new run from the weights "
                "with --finetune"
            )
    for number, now in enumerate(plan.stages[num_begun:], start=num_begun):
        # A planned stage may lie before the checkpoint and not have begun: it begins with the next
        # iteration, or a rollback returned to an earlier one.
        was = stages[number] if number < len(stages) else None
        is_planned = was is not None and (was.sample, was.content) == (now.sample, now.content)
        if now.sample < consumed and not is_planned:
            raise UserError(
                f"{_PATH}[{number}].at: sample {now.sample:,} lies before sample {consumed:,}, "
                f"which {at} has reached; use a later position"
            )
    future = [
        [(stage.sample, stage.content) for stage in one[num_begun:]]
        for one in (stages, plan.stages)
    ]
    return "" if future[0] == future[1] else f"edited from stage {num_begun} on"


def _shown_factors(stage: Stage) -> str:
    return "".join(f", {name} at {factor:g} x lr" for name, factor in stage.lr_multipliers.items())


def _read(recorded: Mapping[str, Any], at: object) -> _Recorded:
    if not recorded:  # a run without stages, or of an earlier version
        plain: _RecordedStage = {"at": 0, "sample": 0, "trainable": ["all"], "lr_multipliers": {}}
        return {"unit": "samples", "stages": [plain], "started": [(0, 0)]}
    try:
        # JSON has neither tuples nor whole floats.
        found = _RECORDED.validate_python(dict(recorded), strict=False)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(key)[:40] for key in ("stages", *problem["loc"]))
        raise UserError(
            f"{at}/state.json: {place}: {problem['msg'][:120]}; load another checkpoint"
        ) from None
    numbers = [number for number, _ in found["started"]]
    if numbers != sorted(set(numbers)) or not set(numbers) <= set(range(len(found["stages"]))):
        raise UserError(f"{at}/state.json: stages.started: is damaged; load another checkpoint")
    return found


@dataclass(frozen=True)
class _Piece:
    """A part of one of the inner optimizer's parameters that is trained."""

    main: torch.Tensor  # the inner optimizer's parameter
    begin: int  # the first value of the part in the flattened parameter
    end: int  # the value after the last
    segment: Segment

    @property
    def is_whole(self) -> bool:
        return self.begin == 0 and self.end == self.main.numel()


class StagedOptimizer:
    """Applies a plan to model chunks and their optimizer; see the module's docstring.

    Every rank has one and calls it at the same iterations.
    """

    def __init__(
        self,
        plan: StagePlan,
        chunks: Sequence[Any],
        optimizer: Any,
        parts: Mapping[torch.Tensor, Sequence[ParameterShard]],
        length: RunLength,
        *,
        skips_weight_gradients: bool,
    ) -> None:
        """Replaces the steps of the inner optimizers.

        Args:
            plan: The stages.
            chunks: Model chunks with gradient buffers.
            optimizer: megatron-core's optimizer of the chunks.
            parts: The position of each parameter in the whole model.
            length: The length of the run.
            skips_weight_gradients: Whether tensors that are frozen need not require gradients.
        """
        self._plan = plan
        self._length = length
        self._skips = skips_weight_gradients
        self._parts = {
            parameter: (_tensor_name(found[0]), _offsets(found[0])[-len(found[0].shape)])
            for parameter, found in parts.items()
        }
        self._optimizers = single(optimizer)
        self._started: list[tuple[int, int]] = []
        self._pieces: list[list[_Piece]] = [[] for _ in self._optimizers]
        self._frozen: list[tuple[Any, int, int]] = []  # parameters, with ranges of their values
        self._lr_position = 0
        for number, one in enumerate(self._optimizers):
            one.optimizer.step = self._replaced_step(number, one, one.optimizer.step)
        for chunk in chunks:
            embedding = getattr(getattr(chunk, "module", chunk), "embedding", None)
            if embedding is not None:
                # Pipelines and recomputation send gradients back through frozen layers as well.
                embedding.register_forward_hook(_require_gradient)

    @property
    def stage(self) -> int | None:
        """The number of the current stage; None for a run without stages."""
        is_staged = self._started and self._plan.record(self._started)
        return self._started[-1][0] if is_staged else None

    def state(self) -> dict[str, Any]:
        """Returns the state for a checkpoint, as JSON; see `StagePlan.record`."""
        return self._plan.record(self._started)

    def restore(self, recorded: Mapping[str, Any], checkpoint: object) -> None:
        """Continues from what a checkpoint recorded, after its optimizer state was loaded."""
        started = _read(recorded, checkpoint)["started"]
        # With --no-load-optim, the number of updates begins again at 0.
        num_updates = self._num_updates()
        self._started = [(number, min(before, num_updates)) for number, before in started]
        if self._started:
            self._apply()

    def begin_iteration(self, sample: int, lr_position: int) -> None:
        """Starts the stage of the iteration that begins at ``sample``, if it is another one.

        ``lr_position`` is the position in the schedule of the learning rate.
        """
        self._lr_position = lr_position
        index = self._plan.index_at(sample)
        if self._started and self._started[-1][0] == index:
            return
        is_first = not self._started
        self._started.append((index, self._num_updates()))
        self._apply()
        if not is_first:
            self._reset_moments()
        if len(self._plan.stages) > 1 or not is_first:
            logger.info(
                "stage %d begins at sample %d: %s", index, sample, self._plan.describe(index)
            )

    def mask_gradients(self) -> None:
        """Sets the gradients of what is frozen to 0, once they are reduced."""
        for parameter, begin, end in self._frozen:
            parameter.main_grad.view(-1)[begin:end].zero_()

    def _apply(self) -> None:
        """Sets what requires gradients, and finds what is frozen and what updates change."""
        ranges = {}
        self._frozen = []
        for parameter, (tensor, first_row) in self._parts.items():
            segments = self._plan.segments(self._started, tensor)
            ranges[parameter] = list(_ranges(segments, parameter, first_row))
            # Alike on every rank, although a rank may hold frozen rows only: the layers' messages
            # depend on it.
            is_trained = any(segment.is_trainable for segment in segments)
            # megatron-core's linear layers compute no gradient of a bias beside a frozen weight.
            bias = f"{tensor.removesuffix('.weight')}.bias"
            if bias in self._plan.shapes:
                is_trained |= bool(self._plan.trained_rows(self._started[-1][0], bias))
            parameter.requires_grad_(is_trained or not self._skips)
            if parameter.requires_grad:
                self._frozen += [
                    (parameter, begin, end)
                    for segment, begin, end in ranges[parameter]
                    if not segment.is_trainable
                ]
        self._pieces = [
            [
                _Piece(main, first, last, segment)
                for parameter, main, offset, _ in main_parameters(one)
                for segment, begin, end in ranges[parameter]
                if segment.is_trainable
                if (first := max(begin - offset, 0)) < (last := min(end - offset, main.numel()))
            ]
            for one in self._optimizers
        ]

    def _num_updates(self) -> int:
        groups = self._optimizers[0].optimizer.param_groups
        return int(groups[0].get("step", 0)) if groups else 0

    def _reset_moments(self) -> None:
        """Sets the moments of what begins to be trained to 0."""
        for one, pieces in zip(self._optimizers, self._pieces, strict=True):
            for piece in pieces:
                state = one.optimizer.state.get(piece.main)
                if state and piece.segment.first_update == self._started[-1][1]:
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name].view(-1)[piece.begin : piece.end].zero_()

    def _replaced_step(self, number: int, one: Any, step: Callable[[], None]) -> Callable[[], None]:
        """Returns what replaces ``step``, the step of the inner optimizer of ``one``."""
        inner = one.optimizer

        def step_trained() -> None:
            groups = inner.param_groups
            inner.param_groups = self._groups(one, self._pieces[number])
            try:
                if inner.param_groups:
                    step()
            finally:
                for group in inner.param_groups:
                    for view in group["views"]:
                        del inner.state[view]
                        _scales(inner).pop(view, None)
                inner.param_groups = groups
            for group in groups:
                group["step"] = group.get("step", 0) + 1

        return step_trained

    def _groups(self, one: Any, pieces: Sequence[_Piece]) -> list[dict[str, Any]]:
        """Returns the groups of an update, with the parameters and the views that it changes."""
        groups = one.optimizer.param_groups
        of_main = {id(main): n for n, group in enumerate(groups) for main in group["params"]}
        made: dict[tuple[Any, ...], dict[str, Any]] = {}
        for piece in pieces:
            number, segment = of_main[id(piece.main)], piece.segment
            key = (number, replace(segment, begin=0, end=0))
            if key not in made:
                group = groups[number]
                rate = self._decoupled_rate() if segment.is_decoupled else group["lr"]
                made[key] = {
                    **group,
                    "params": [],
                    "views": [],
                    "lr": rate * segment.lr_multiplier,
                    "weight_decay": group["weight_decay"] if segment.has_weight_decay else 0.0,
                    "step": group.get("step", 0) - segment.first_update,
                }
            target = piece.main
            if not piece.is_whole:
                target = _view(one, piece)
                made[key]["views"].append(target)
            made[key]["params"].append(target)
        return list(made.values())

    def _decoupled_rate(self) -> float:
        settings = self._plan.optimizer
        assert settings.decoupled_lr is not None, "it is the reason for the call"
        low = settings.min_lr if settings.decoupled_min_lr is None else settings.decoupled_min_lr
        position = np.array([self._lr_position])
        own = replace(settings, lr=settings.decoupled_lr, min_lr=low)
        return float(learning_rates(own, self._length, position)[0])


def _view(one: Any, piece: _Piece) -> torch.Tensor:
    """Returns a view of a piece's values, with views of its gradient and its optimizer state."""
    main, inner = piece.main, one.optimizer
    initialize_state(one, main)

    def cut(values: torch.Tensor) -> torch.Tensor:
        return values.detach().view(-1)[piece.begin : piece.end]

    view = cut(main)
    for name in ("grad", "decoupled_grad"):
        gradient = getattr(main, name, None)
        if gradient is not None:
            setattr(view, name, cut(gradient))
    inner.state[view] = {name: cut(values) for name, values in inner.state[main].items()}
    if main in _scales(inner):
        _scales(inner)[view] = _scales(inner)[main]
    return view


def _scales(inner: Any) -> dict[torch.Tensor, Any]:
    """Returns the scales of the optimizer state by parameter.

    Only transformer-engine's Adam has them, of all state that is not fp32. An update looks them up
    in any case, but bf16 state is stored without a scale.
    """
    found: dict[torch.Tensor, Any] = getattr(inner, "_scales", {})
    return found


def _ranges(
    segments: Sequence[Segment], parameter: torch.Tensor, first_row: int
) -> Iterator[tuple[Segment, int, int]]:
    """Yields the segments of a parameter with ranges of its flattened values on this rank.

    ``first_row`` is the position of the parameter's first row in the whole tensor.
    """
    if len(segments) == 1:  # only vocabularies have ranges of rows
        yield segments[0], 0, parameter.numel()
        return
    num_rows = parameter.shape[0]
    row = parameter.numel() // num_rows
    for segment in segments:
        begin, end = max(segment.begin - first_row, 0), min(segment.end - first_row, num_rows)
        if begin < end:
            yield segment, begin * row, end * row


def _require_gradient(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()


def _tensor_name(part: ParameterShard) -> str:
    """Returns a tensor's name with the number of its layer, as in `RULES`."""
    offsets = _offsets(part)
    if len(offsets) == len(part.shape):
        return part.name
    return part.name.replace("decoder.layers.", f"decoder.layers.{offsets[0]}.", 1)


def _offsets(part: ParameterShard) -> tuple[int, ...]:
    """Returns where a shard begins in the whole tensor, whose first axis may be that of layers."""
    return part.offsets_of((0,) * len(part.shape))
