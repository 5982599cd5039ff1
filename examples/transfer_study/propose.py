"""Fits the recency model to the results and proposes a schedule for the study's goal."""

from statistics import fmean
from typing import Any

import numpy as np

from examples.transfer_study.analysis import Analysis, Cell
from examples.transfer_study.arms import ARMS, DESCRIPTION, SOURCES
from examples.transfer_study.prepare import digest_of
from examples.transfer_study.study import PROPOSED, ModelSize, Results
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

GOAL: dict[str, float] = DESCRIPTION["goal"]


def observations(analysis: Analysis, model: str) -> list[Observation]:
    """Returns one observation of each arm and random schedule, the mean over its seeds."""
    return merge_replicates(
        [
            Observation(f"{cell}", trajectory_of(entry), entry["final"])
            for cell, seeds in analysis.runs.items()
            if cell.model == model and cell.arm != PROPOSED
            for entry in seeds.values()
        ]
    )


def trajectory_of(entry: dict[str, Any]) -> Trajectory:
    """Returns what a run read, from its result."""
    record = RunRecord("", entry["trajectory"], entry["final"])
    return record.observation(SOURCES).trajectory


def goal_score(analysis: Analysis, cell: Cell) -> float:
    """Returns the weighted mean of the logarithms of a cell's final losses, over its seeds."""
    total = sum(GOAL.values())
    return fmean(
        sum(weight / total * np.log(entry["final"][name]) for name, weight in GOAL.items())
        for entry in analysis.runs[cell].values()
    )


def propose(results: Results, model: ModelSize) -> dict[str, Any]:
    """Returns the schedule that the fit proposes, and records it with its prediction.

    A recorded proposal that was made from the same results is returned again.

    Raises:
        UserError: There are too few results.
    """
    entries = {key: one for key, one in results.entries.items() if one["arm"] != PROPOSED}
    analysis = Analysis.of(entries, results.foundations)
    made_of = digest_of(
        sorted(one["digest"] for one in entries.values() if one["model"] == model.name)
    )
    known = results.proposals.get(model.name)
    if known is not None and known["made_of"] == made_of:
        block: dict[str, Any] = known["schedule"]
        return block
    fit = fit_recency(observations(analysis, model.name), SOURCES)
    cells = {
        arm: Cell(model.name, model.learning_rates[0], False, arm)
        for arm in ARMS
        if Cell(model.name, model.learning_rates[0], False, arm) in analysis.runs
    }
    best = min(cells, key=lambda arm: goal_score(analysis, cells[arm]))
    entry = next(iter(analysis.runs[cells[best]].values()))
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
        "made_of": made_of,
        "goal": GOAL,
        "schedule": block,
        "best_arm": best,
        "predicted": fit.predict(proposal.trajectory),
        "predicted_best_arm": fit.predict(trajectory_of(entry)),
        "score": proposal.score,
        "fit": {
            name: {
                "span_tokens": target.span,
                "lasting": target.lasting,
                "saturation_tokens": target.saturation,
                "coefficients": target.coefficients.tolist(),
                "leave_one_out_error": target.sigma,
                "spread": target.spread,
                "num_runs": target.num_runs,
            }
            for name, target in fit.targets.items()
        },
    }
    results.write()
    return block
