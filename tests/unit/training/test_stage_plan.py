"""Tests the plan of stages, edits of it on a resume, and updates of a toy optimizer."""

import re
import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_run import write_checkpoint_state

from megatron_chatflow.blend.edits import run_positions
from megatron_chatflow.checkpoint.megatron import ParameterShard
from megatron_chatflow.config import RunConfig, RunLength
from megatron_chatflow.config.stages import ALL_ROWS, EMBEDDING
from megatron_chatflow.errors import UserError
from megatron_chatflow.training.inputs import open_inputs
from megatron_chatflow.training.optimizer import FusedAdamW
from megatron_chatflow.training.stages import (
    Segment,
    StagedOptimizer,
    StagePlan,
    check_edit,
    plan_stages,
)

MakeConfig = Callable[..., RunConfig]
NEW_ROWS = (500, 600)
STANDIN = Path(__file__).parents[2] / "te_standin" / "transformer_engine" / "pytorch"
STAGES = [
    {"at": 0, "trainable": ["new_rows"], "lr_multipliers": {"all": 2.0, "output": 3.0}},
    {"at": 20, "trainable": ["rows.590-", "layers.0-1"]},
    {"at": 41, "trainable": ["all"]},
]


def make_plan(config: RunConfig, new_rows: tuple[int, int] | None = NEW_ROWS) -> StagePlan:
    return plan_stages(config, run_positions(config), 600, new_rows)


def test_a_stage_begins_with_the_first_iteration_at_or_after_it(make_config: MakeConfig) -> None:
    plan = make_plan(make_config(train__stages=STAGES))
    assert [plan.index_at(sample) for sample in (0, 16, 24, 40, 48)] == [0, 0, 1, 1, 2]
    in_iterations = make_config(
        train__stages=[STAGES[0], {"at": 3, "trainable": ["all"]}],
        data__schedule={
            "unit": "iterations",
            "knots": [{"at": 0, "weights": {"first": 1, "second": 1}}],
        },
    )
    assert [stage.sample for stage in make_plan(in_iterations).stages] == [0, 24]


def test_rows_have_their_own_factor_and_number_of_updates(make_config: MakeConfig) -> None:
    plan = make_plan(make_config(train__stages=STAGES))
    first = plan.segments([(0, 0)], "output_layer.weight")
    assert first == [
        Segment(0, 500, is_trainable=False, lr_multiplier=3.0),
        Segment(500, ALL_ROWS[1], is_trainable=True, lr_multiplier=3.0),
    ]
    last = plan.segments([(0, 0), (1, 7), (2, 11)], EMBEDDING)
    assert last == [
        Segment(0, 500, is_trainable=True, first_update=11),
        Segment(500, 590, is_trainable=True, first_update=11),
        Segment(590, ALL_ROWS[1], is_trainable=True, first_update=0),
    ]
    layer = plan.segments([(0, 0), (1, 7), (2, 11)], "decoder.layers.1.mlp.linear_fc2.weight")
    assert layer == [Segment(0, ALL_ROWS[1], is_trainable=True, first_update=7)]


def test_counts_what_a_stage_trains(make_config: MakeConfig) -> None:
    plan = make_plan(make_config(train__stages=STAGES))
    assert plan.num_trained(0) == 2 * 100 * 64
    assert plan.num_trained(2) == sum(torch.Size(shape).numel() for shape in plan.shapes.values())
    rows = plan.table(RunLength.of(make_config(train__stages=STAGES)))
    assert [row["iterations"] for row in rows] == ["1 to 3", "4 to 6", "7 to 10"]


def test_a_stage_leaves_out_weight_gradients_of_what_it_freezes(make_config: MakeConfig) -> None:
    """Some rows need the gradient of their whole tensor; gradients of inputs are always needed."""
    plan = make_plan(make_config(train__stages=STAGES))
    full = 10**9
    numel = {tensor: torch.Size(shape).numel() for tensor, shape in plan.shapes.items()}
    ends = numel[EMBEDDING] + numel["output_layer.weight"]
    layers = sum(size for tensor, size in numel.items() if tensor.startswith("decoder.layers."))
    assert plan.flops_per_token(0, full) == full - 2 * (sum(numel.values()) - ends)
    assert plan.flops_per_token(1, full) == full - 2 * (layers // 2 + 64)  # the final norm
    assert plan.flops_per_token(2, full) == full


def test_settings_of_tensors(make_config: MakeConfig) -> None:
    config = make_config(optimizer__decoupled_lr=1e-3, optimizer__no_weight_decay=["layers.0"])
    plan = make_plan(config)
    assert not plan.is_trivial and make_plan(make_config()).is_trivial
    (embedding,) = plan.segments([(0, 0)], EMBEDDING)
    (layer,) = plan.segments([(0, 0)], "decoder.layers.0.mlp.linear_fc2.weight")
    assert embedding.is_decoupled and embedding.has_weight_decay
    assert not layer.is_decoupled and not layer.has_weight_decay


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("new_rows", "new_rows: the vocabulary of this run has no new rows; set --embedding-init"),
        ("layers.4", "layers.4: selects nothing; the model has 4 layers"),
        ("decoder.nothing.*", "decoder.nothing.*: selects nothing; the model has 4 layers"),
        ("rows.600-", "rows.600-: selects nothing; the vocabulary has 600 rows"),
    ],
)
def test_refuses_what_selects_nothing(make_config: MakeConfig, selector: str, message: str) -> None:
    config = make_config(train__stages=[{"at": 0, "trainable": ["layers.0", selector]}])
    with pytest.raises(UserError, match=re.escape(f"train.stages[0].trainable: {message}")):
        make_plan(config, None)


def edit(plan: StagePlan, stages: list[Any], make_config: MakeConfig, consumed: int) -> str:
    recorded = plan.record([(0, 0), (1, 3)])
    return check_edit(make_plan(make_config(train__stages=stages)), recorded, consumed, "X")


def test_the_future_may_be_edited_and_the_past_may_not(make_config: MakeConfig) -> None:
    plan = make_plan(make_config(train__stages=STAGES))
    assert edit(plan, STAGES, make_config, 32) == ""
    later = [*STAGES[:2], {"at": 64, "trainable": ["all"]}]
    assert edit(plan, later, make_config, 32) == "edited from stage 2 on"
    other = [STAGES[0], {"at": 20, "trainable": ["all"]}, STAGES[2]]
    with pytest.raises(UserError, match=r"train.stages\[1\]: has begun before X and differs"):
        edit(plan, other, make_config, 32)
    with pytest.raises(UserError, match=r"train.stages\[1\]: has begun"):
        edit(plan, STAGES[:1], make_config, 32)
    # Stage 2 begins with the iteration at sample 48, and may no longer change before it.
    assert edit(plan, STAGES, make_config, 48) == ""
    for past in ({"at": 44, "trainable": ["all"]}, {"at": 41, "trainable": ["layers.0"]}):
        with pytest.raises(UserError, match=r"train.stages\[2\].at: sample 4\d lies before sample"):
            edit(plan, [*STAGES[:2], past], make_config, 48)


def test_a_run_without_stages_may_get_some(make_config: MakeConfig) -> None:
    plan = make_plan(make_config())
    assert plan.record([(0, 0)]) == {}
    stages = [{"at": 0, "trainable": ["all"]}, {"at": 40, "trainable": ["embeddings"]}]
    assert "stage 1" in check_edit(make_plan(make_config(train__stages=stages)), {}, 40, "X")
    with pytest.raises(UserError, match=r"train.stages\[0\]: has begun"):
        check_edit(make_plan(make_config(train__stages=STAGES)), {}, 40, "X")


def test_a_second_growth_is_refused_once_a_stage_has_trained_the_first(
    make_config: MakeConfig,
) -> None:
    before, after = (make_plan(make_config(train__stages=STAGES), (k, k + 50)) for k in (500, 550))
    recorded = before.record([(0, 0)])
    assert check_edit(before, recorded, 8, "X", [500, 550]) == ""
    with pytest.raises(UserError, match=r"train.stages\[0\]: has begun before X and selects new_r"):
        check_edit(after, recorded, 8, "X", [500, 550])
    later = [{"at": 0, "trainable": ["all"]}, {"at": 40, "trainable": ["new_rows"]}]
    after = make_plan(make_config(train__stages=later), (550, 600))
    assert check_edit(after, after.record([(0, 0)]), 8, "X", [500, 550]) == ""


def test_positions_follow_the_batch_of_a_controlled_run(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    def config(batch: int, *stages: dict[str, Any], **checkpoint: str) -> RunConfig:
        return make_config(
            data__schedule={
                "unit": "iterations",
                "knots": [{"at": 0, "weights": {"first": 1, "second": 1}}],
                "controller": {"name": "odm", "horizon": 4},
            },
            train__global_batch_size=batch,
            train__stages=list(stages),
            checkpoint=checkpoint,
        )

    everything, later = {"at": 0, "trainable": ["all"]}, {"at": 7, "trainable": ["layers.0"]}
    control = open_inputs(config(8)).control
    assert control is not None
    while control.is_due(40):
        control.blend.append(control.propose()[0])
    state = {**control.blend.state_at(40), "controller": control.state()}
    write_checkpoint_state(config(8), tmp_path, blend=state)
    resumed = open_inputs(config(16, everything, later, load=str(tmp_path)))
    assert [stage.sample for stage in resumed.stages.stages] == [0, 5 * 8 + 2 * 16]


def test_positions_have_the_unit_of_the_file(make_config: MakeConfig, tmp_path: Path) -> None:
    first, last = ({"first": 1, "second": weight} for weight in (1, 2))
    knots = [{"at": 0, "weights": first}, {"at": 52, "weights": last, "ramp": "linear"}]
    write_checkpoint_state(make_config(data__schedule={"knots": knots}), tmp_path)
    resumed = open_inputs(
        make_config(
            # The knot at sample 52 has no iteration, so the schedule stays in samples.
            data__schedule={
                "unit": "iterations",
                "knots": [{"at": 8, "weights": "as_planned"}, {"at": 9, "weights": first}],
            },
            train__stages=[{"at": 0, "trainable": ["all"]}, {"at": 7, "trainable": ["layers.0"]}],
            checkpoint={"load": str(tmp_path)},
        )
    )
    assert resumed.blend.schedule.unit == "samples"
    assert [stage.sample for stage in resumed.stages.stages] == [0, 56]


@pytest.mark.parametrize(
    "damage", [{"started": [[5, 0]]}, {"started": "x"}, {"stages": [{}]}, {"unit": 3}]
)
def test_a_damaged_record_is_refused(make_config: MakeConfig, damage: dict[str, Any]) -> None:
    plan = make_plan(make_config(train__stages=STAGES))
    with pytest.raises(UserError, match="state.json: stages"):
        check_edit(plan, {**plan.record([(0, 0)]), **damage}, 0, "X")


class Toy:
    """One matrix of the vocabulary on one rank, with megatron-core's interface around it."""

    def __init__(
        self,
        plan: StagePlan,
        length: RunLength,
        *,
        skips: bool = True,
        adam: Callable[..., Any] = FusedAdamW,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(600, 4, generator=generator))
        weight.main_grad = torch.zeros(600, 4)  # type: ignore[attr-defined]
        self.weight, self.generator = weight, generator
        self.inner = adam([weight], lr=1e-2, weight_decay=0.1)
        settings = SimpleNamespace(use_precision_aware_optimizer=adam is not FusedAdamW)
        outer = SimpleNamespace(
            optimizer=self.inner, config=settings, get_parameters=lambda: [weight]
        )
        part = ParameterShard(EMBEDDING, (600, 4), 0, (600, 4), True, False, (0, 0))
        self.staged = StagedOptimizer(
            plan, [], outer, {weight: [part]}, length, skips_weight_gradients=skips
        )

    def step(self, sample: int) -> torch.Tensor:
        """Makes an update and returns the change."""
        before = self.weight.detach().clone()
        self.staged.begin_iteration(sample, sample)
        self.weight.main_grad.copy_(torch.randn(600, 4, generator=self.generator))  # type: ignore
        self.staged.mask_gradients()
        self.weight.grad = self.weight.main_grad  # type: ignore[attr-defined]
        self.inner.step()
        return self.weight.detach() - before


def test_frozen_rows_are_masked_and_kept_whatever_their_moments_are(
    make_config: MakeConfig,
) -> None:
    stages = [
        {"at": 0, "trainable": ["all"]},
        {"at": 8, "trainable": ["rows.100-199"]},
        {"at": 16, "trainable": ["layers.0"]},
        {"at": 24, "trainable": ["all"]},
    ]
    config = make_config(train__stages=stages)
    toy = Toy(make_plan(config), RunLength.of(config))
    assert toy.step(0).ne(0).all()
    state = toy.inner.state[toy.weight]
    moments = state["exp_avg"].clone()
    change = toy.step(8)
    assert change[100:200].ne(0).all() and not change[:100].any() and not change[200:].any()
    assert not toy.weight.grad[200:].any() and toy.weight.grad[100:200].any()  # type: ignore
    assert torch.equal(state["exp_avg"][200:], moments[200:])
    assert list(toy.inner.state) == [toy.weight]
    assert not toy.step(16).any() and not toy.weight.requires_grad
    decayed = toy.weight.detach() * (1 - 1e-2 * 0.1)
    change = toy.step(24)
    # Moments of an earlier stage are gone: every first update is one learning rate.
    moved = (toy.weight.detach() - decayed).abs() / 1e-2
    assert torch.allclose(moved, torch.ones_like(moved), atol=1e-3)
    assert toy.weight.requires_grad and toy.inner.param_groups[0]["step"] == 4
    assert toy.staged.state()["started"] == [[0, 0], [1, 1], [2, 2], [3, 3]]


def test_rows_with_bf16_moments(make_config: MakeConfig) -> None:
    """transformer-engine looks up a scale of all moments that are not fp32."""
    config = make_config(train__stages=[{"at": 0, "trainable": ["rows.100-199"]}])
    adam = runpy.run_path(str(STANDIN / "optimizers.py"))["FusedAdam"]
    half = partial(adam, exp_avg_dtype=torch.bfloat16, exp_avg_sq_dtype=torch.bfloat16)
    toy = Toy(make_plan(config), RunLength.of(config), adam=half)
    for sample in (0, 8):
        change = toy.step(sample)
        assert change[100:200].ne(0).all() and not change[:100].any() and not change[200:].any()
    moments = toy.inner.state[toy.weight]["exp_avg"]
    assert moments.dtype == torch.bfloat16 and moments[100:200].any() and not moments[200:].any()
    assert list(toy.inner.state) == list(toy.inner._scales) == [toy.weight]


def test_a_restored_optimizer_continues_without_a_new_beginning(make_config: MakeConfig) -> None:
    stages = [{"at": 0, "trainable": ["rows.0-9"]}, {"at": 8, "trainable": ["all"]}]
    config = make_config(train__stages=stages)
    plan, length = make_plan(config), RunLength.of(config)
    whole, resumed = Toy(plan, length), Toy(plan, length)
    for sample in (0, 8, 16):
        whole.step(sample)
    for sample in (0, 8):
        resumed.step(sample)
    second = Toy(plan, length)
    second.weight.data.copy_(resumed.weight.data)
    second.inner.state[second.weight] = dict(resumed.inner.state[resumed.weight])
    second.inner.param_groups[0]["step"] = 2
    second.generator.set_state(resumed.generator.get_state())
    second.staged.restore(resumed.staged.state(), "X")
    second.step(16)
    assert torch.equal(second.weight, whole.weight)


def test_rates_and_weight_decay_of_an_update(make_config: MakeConfig) -> None:
    stages = [{"at": 0, "trainable": ["all"], "lr_multipliers": {"rows.0-99": 0.5}}]
    config = make_config(
        train__stages=stages,
        optimizer__lr_decay_style="constant",
        optimizer__lr_warmup_iters=0,
        optimizer__decoupled_lr=4e-3,
        optimizer__no_weight_decay=["embeddings"],
    )
    toy = Toy(make_plan(config), RunLength.of(config))
    change = toy.step(0).abs()
    assert torch.allclose(change[:100], torch.full((100, 4), 2e-3), rtol=1e-3)
    assert torch.allclose(change[100:], torch.full((500, 4), 4e-3), rtol=1e-3)
    plain = make_config(train__stages=stages)
    change = Toy(make_plan(plain), RunLength.of(plain)).step(0).abs()
    assert change[100:].min() > 5e-3, "the rate of the group, and its weight decay"
    assert change[100:].max() > 1.1e-2
