"""Fits the recency model to the results and proposes a schedule for the study's goal."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import numpy as np

from examples.transfer_study.analysis import GOAL, Analysis, Cell
from examples.transfer_study.arms import ARMS, SOURCES, static_schedule
from examples.transfer_study.results import Results
from examples.transfer_study.study import (
    LEARNING_RATES,
    PROPOSED,
    PROPOSED_STATIC,
    REFERENCE,
    SEQ_LENGTH,
    ModelSize,
    Run,
    Study,
)
from megatron_chatflow.blend import Blend, Schedule
from megatron_chatflow.blend.fit import (
    FloatArray,
    Observation,
    RecencyFit,
    RunRecord,
    Trajectory,
    fit_recency,
    merge_replicates,
    propose_schedule,
    schedule_block,
)


def observations(analysis: Analysis, model: str) -> list[Observation]:
    """Returns one observation of each arm and random schedule, the mean over its seeds.

    The Chinese-only arm without a tail is not a mixture and is left out.
    """
    found = [
        record_of(entry, f"{cell}", cell.arm)
        for cell, seeds in analysis.runs.items()
        if cell.model == model and cell.arm not in (PROPOSED, PROPOSED_STATIC)
        for entry in seeds.values()
    ]
    return merge_replicates([one.observation(SOURCES) for one in found if one.is_mixture])


def record_of(entry: Mapping[str, Any], name: str = "", group: str = "") -> RunRecord:
    """Returns what the fit reads of a result."""
    return RunRecord(name, entry["trajectory"], entry["final"], group)


def trajectory_of_block(
    block: Mapping[str, Any], model: ModelSize, learning_rate: FloatArray
) -> Trajectory:
    """Returns what a schedule reads, in parts like those of ``learning_rate``.

    Args:
        block: The schedule.
        model: The size, whose arms are as long.
        learning_rate: float64[num_parts], of a run with as many iterations.
    """
    budget = model.budget
    schedule = Schedule.from_dict(block, SOURCES, budget.samples_per_iteration)
    source, _ = Blend(schedule).take(0, budget.num_samples)
    length = -(-budget.iterations // len(learning_rate)) * budget.samples_per_iteration
    parts = [source[start : start + length] for start in range(0, len(source), length)]
    counts = np.stack([np.bincount(part, minlength=len(SOURCES)) for part in parts])
    return Trajectory(learning_rate, np.asarray(counts * SEQ_LENGTH, np.float64))


def goal_of(analysis: Analysis, cell: Cell) -> float:
    """Returns the weighted mean of the logarithms of a cell's final losses, over its seeds."""
    return fmean(analysis.values(cell, "goal").values())


def propose(results: Results, study: Study, model: ModelSize) -> dict[str, Any]:
    """Returns the schedule that the fit proposes, and records it with its prediction.

    What was recorded once is returned again, whatever results came after it.

    Raises:
        UserError: There are too few results.
    """
    known = results.proposals.get(model.name)
    if known is not None:
        block: dict[str, Any] = known["schedule"]
        return block
    entries = [
        entry
        for entry in results.current(study)[0].values()
        if entry["model"] == model.name and not Run.of(entry).is_proposed
    ]
    analysis = Analysis.of(entries)
    fit = fit_recency(observations(analysis, model.name), SOURCES)
    cells = {
        arm: Cell(model.name, LEARNING_RATES[0], False, arm)
        for arm in ARMS
        if analysis.values(Cell(model.name, LEARNING_RATES[0], False, arm), "goal")
    }
    best = min(cells, key=lambda arm: goal_of(analysis, cells[arm]))
    cell = analysis.reference(cells[best]) if best == REFERENCE else cells[best]
    entry = next(iter(analysis.runs[cell].values()))
    read = record_of(entry).observation(SOURCES).trajectory
    sizes = {name: float(count) for name, count in model.tokens.training_tokens().items()}
    num_tokens = entry["tokens"]
    search = (fit, GOAL, read.learning_rate, num_tokens)
    block = schedule_block(
        propose_schedule(*search, max_tokens=sizes), SOURCES, model.budget.iterations
    )
    # The best mixture without an order shows what the order adds to the choice of the totals.
    mixture = propose_schedule(*search, max_tokens=sizes, num_knots=1)
    trajectories = {
        PROPOSED: trajectory_of_block(block, model, read.learning_rate),
        PROPOSED_STATIC: trajectory_of_block(
            static_schedule(block, model.budget), model, read.learning_rate
        ),
        "best_static": mixture.trajectory,
        "best_arm": read,
    }
    results.proposals[model.name] = {
        "made_of": sorted(entry["digest"] for entry in entries),
        "goal": GOAL,
        "schedule": block,
        "best_arm": best,
        "best_static": dict(zip(SOURCES, mixture.shares[0].tolist(), strict=True)),
        "predicted": {
            name: {"goal": _goal_interval(fit, one), **fit.predict(one)}
            for name, one in trajectories.items()
        },
        "fit": {
            name: {
                "span_tokens": target.span,
                "lasting": target.lasting,
                "saturation_tokens": target.saturation,
                "coefficients": target.coefficients.tolist(),
                "leave_arm_out_error": target.sigma,
                "spread": target.spread,
                "num_runs": target.num_runs,
            }
            for name, target in fit.targets.items()
        },
    }
    results.write()
    return block


def _goal_interval(fit: RecencyFit, trajectory: Trajectory) -> tuple[float, float, float]:
    """Returns the predicted goal and the ends of its interval of two standard deviations."""
    mean, deviation = fit.predict_goal(trajectory, GOAL)
    return mean, mean - 2 * deviation, mean + 2 * deviation
