"""Compares orders of the same data: does a dynamic schedule transfer better than a static blend?

Trains every arm that has no result yet, and writes results.json, tables and figures to
runs/transfer_study. Interrupted runs continue from their last checkpoint.
"""

from megatron_chatflow.errors import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # the imports below take seconds

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.steps import ROOT, announce
from examples.transfer_study.arms import check_equal_totals
from examples.transfer_study.propose import propose
from examples.transfer_study.report import write_report
from examples.transfer_study.study import (
    FULL,
    PROPOSED,
    QUICK,
    Prepared,
    Results,
    Run,
    Study,
    Workers,
    default_workers,
    make_config,
    num_gpus,
    plan,
    prepare,
    proposed_runs,
    run_budget,
    train_all,
)
from megatron_chatflow.errors import ArgumentParser, UserError, run_main

_EPILOG = """examples:
  python -m examples.transfer_study                      # all that is missing (make study)
  python -m examples.transfer_study --quick              # 15 minutes on two cores
  python -m examples.transfer_study --models small --seeds 1
  python -m examples.transfer_study --list
  python -m examples.transfer_study --report --results examples/transfer_study/results.json"""


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("--quick", action="store_true", help="few short arms, about 15 minutes")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="JSON",
        help="results to continue; default: results.json in the folder of the runs",
    )
    names = [model.name for model in FULL.models]
    parser.add_argument("--models", nargs="+", choices=names, help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="default: all")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="runs at a time; default: one per core or GPU"
    )
    parser.add_argument("--list", action="store_true", help="show what is done and what remains")
    parser.add_argument("--report", action="store_true", help="only write the page again")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is missing and writes the page."""
    args = _parse(argv)
    study = QUICK if args.quick else FULL
    os.chdir(ROOT)
    results = Results(args.results or study.folder / "results.json")
    if args.report:
        for path in write_report(results, study, None):
            print(path)
        return
    runs = [
        run
        for run in plan(study)
        if (args.models is None or run.model in args.models)
        and (args.seeds is None or run.seed in args.seeds)
    ]
    if args.list:
        print("\n".join(list_runs(runs, study, results)))
        return
    num_workers = default_workers() if args.workers is None else args.workers
    if not 1 <= num_workers <= (num_gpus() or 1 << 10):
        raise UserError(f"--workers: must be from 1 to the number of GPUs, not {num_workers}")
    for model in study.models:
        check_equal_totals(model.budget)
    cores = 1 if num_gpus() else max(1, default_workers() // num_workers)
    workers = Workers(num_workers, cores)
    try:
        prepared: dict[str, Prepared] = {}
        for name in dict.fromkeys(run.model for run in runs):
            prepared[name] = prepare(study.model(name), study, results)
        _train(runs, study, prepared, results, workers)
        for name, facts in prepared.items():
            model = study.model(name)
            if proposed_runs(model) and args.seeds is None:
                announce(f"{name}: the schedule that the fit proposes")
                schedule = propose(results, model)
                _train(proposed_runs(model), study, {name: facts}, results, workers, schedule)
    finally:
        workers.close()
    announce("the page")
    for path in write_report(results, study, study.folder):
        print(path)


def _train(
    runs: Sequence[Run],
    study: Study,
    prepared: dict[str, Prepared],
    results: Results,
    workers: Workers,
    schedule: dict[str, Any] | None = None,
) -> None:
    """Trains runs in their order, all runs of a model that follow each other at a time."""
    begin = 0
    while begin < len(runs):
        name = runs[begin].model
        end = begin
        while end < len(runs) and runs[end].model == name:
            end += 1
        part = [(run, make_config(run, study, schedule)) for run in runs[begin:end]]
        announce(f"{name}: {end - begin} runs")
        train_all(part, study, prepared[name], results, workers)
        begin = end


def list_runs(runs: Sequence[Run], study: Study, results: Results) -> list[str]:
    """Returns a line for each run, and the time that is left.

    The time is that of the finished runs of the same model, or an estimate before there are any.
    """
    lines, left = [], 0.0
    for run in runs:
        model = study.model(run.model)
        entry = results.entries.get(run.key)
        is_done = False
        if entry is not None:
            facts = Prepared(
                entry["corpus"], results.foundations.get(run.model, {}).get("digest"), Path()
            )
            is_done = results.has(run, facts.digest(make_config(run, study)))
        budget = run_budget(run, model)
        tokens = budget.num_samples * 512
        measured = [one for one in results.entries.values() if one["model"] == run.model]
        rate = model.tokens_per_second
        if measured:
            rate = sum(one["tokens"] for one in measured)
            rate /= sum(one["core_seconds"] for one in measured)
        if is_done:
            lines.append(f"done     {run.key}")
        else:
            why = " (its configuration has changed)" if entry is not None else ""
            left += tokens / rate
            lines.append(f"remains  {run.key}  {tokens / rate / 60:.1f} core-minutes{why}")
    for model in study.models:
        for run in proposed_runs(model):
            state = "done   " if run.key in results.entries else "remains"
            lines.append(f"{state}  {run.key}  follows from the others ({PROPOSED})")
    done = sum(line.startswith("done") for line in lines)
    cores = default_workers()
    lines.append(
        f"{done} of {len(lines)} runs are done; about {left / 3600:.1f} core-hours remain, "
        f"{left / 3600 / cores:.1f} hours with {cores} workers"
    )
    return lines


if __name__ == "__main__":
    run_main(main)
