"""Fits the recency model to the results and proposes a schedule for the study's goal."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from examples.transfer_study.analysis import GOAL, Analysis, Cell
from examples.transfer_study.arms import ARMS, SOURCES
from examples.transfer_study.study import (
    LEARNING_RATES,
    PROPOSED,
    PROPOSED_STATIC,
    REFERENCE,
    ModelSize,
    Results,
    Run,
    Study,
)
from megatron_chatflow.blend.fit import (
    Observation,
    RunRecord,
    Trajectory,
    fit_recency,
    merge_replicates,
    propose_schedule,
    schedule_block,
)
from megatron_chatflow.data.indexed import IndexedDataset


def observations(analysis: Analysis, model: str) -> list[Observation]:
    """Returns one observation of each arm and random schedule, the mean over its seeds."""
    return merge_replicates(
        [
            Observation(f"{cell}", trajectory_of(entry), entry["final"], group=cell.arm)
            for cell, seeds in analysis.runs.items()
            if cell.model == model and cell.arm not in (PROPOSED, PROPOSED_STATIC)
            for entry in seeds.values()
        ]
    )


def trajectory_of(entry: Mapping[str, Any]) -> Trajectory:
    """Returns what a run read, from its result."""
    record = RunRecord("", entry["trajectory"], entry["final"])
    return record.observation(SOURCES).trajectory


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
    learning_rate = trajectory_of(entry).learning_rate
    sources = model.tokens.sources()
    sizes = {
        name: float(sum(IndexedDataset(path).num_tokens for path in one["paths"]))
        for name, one in sources.items()
        if name in SOURCES
    }
    proposal = propose_schedule(fit, GOAL, learning_rate, entry["tokens"], max_tokens=sizes)
    block = schedule_block(proposal, SOURCES, model.budget.iterations)
    results.proposals[model.name] = {
        "made_of": sorted(entry["digest"] for entry in entries),
        "goal": GOAL,
        "schedule": block,
        "best_arm": best,
        "predicted": fit.predict(proposal.trajectory),
        "extrapolated": fit.extrapolated(proposal.trajectory),
        "predicted_best_arm": fit.predict(trajectory_of(entry)),
        "score": proposal.score,
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
