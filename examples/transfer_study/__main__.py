"""Compares orders of the same data: does a dynamic schedule transfer better than a static blend?

Trains every arm that has no result in examples/transfer_study/results.json yet, and writes tables
and figures to runs/transfer_study. Interrupted runs continue from their last checkpoint.
"""

from megatron_chatflow.errors import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # the imports below take seconds

import argparse
import os
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from examples.steps import ROOT, announce
from examples.transfer_study.arms import check_equal_totals
from examples.transfer_study.prepare import digest_of
from examples.transfer_study.propose import propose
from examples.transfer_study.report import write_report
from examples.transfer_study.results import Results
from examples.transfer_study.study import FULL, QUICK, Run, Study, plan
from examples.transfer_study.training import (
    Clock,
    OutOfTimeError,
    Prepared,
    Workers,
    default_workers,
    missing_runs,
    num_gpus,
    prepare,
    train_all,
)
from megatron_chatflow.errors import ArgumentParser, UserError, run_main
from megatron_chatflow.files import FileLock

_EPILOG = """examples:
  python -m examples.transfer_study                      # all that is missing (make study)
  python -m examples.transfer_study --time-limit 90      # end after about 90 minutes
  python -m examples.transfer_study --quick              # 15 minutes on two cores
  python -m examples.transfer_study --models small --seeds 1
  python -m examples.transfer_study --list
  python -m examples.transfer_study --report             # write the repository's pages again"""


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("--quick", action="store_true", help="few short arms, about 15 minutes")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="JSON",
        help=f"results to continue; default: {FULL.results}, with --quick {QUICK.results}",
    )
    names = [model.name for model in FULL.models]
    parser.add_argument("--models", nargs="+", choices=names, help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="default: all")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="runs at a time; default: one per core or GPU"
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="MINUTES",
        help="start no run that would not finish by then, by the measured speed",
    )
    parser.add_argument(
        "--propose-again",
        action="store_true",
        help="replace the recorded schedule of the fit by one from all results",
    )
    parser.add_argument("--list", action="store_true", help="show what is done and what remains")
    parser.add_argument("--report", action="store_true", help="only write the page again")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is missing and writes the page."""
    args = _parse(argv)
    if args.quick and args.report:
        raise UserError(
            "--report: writes the repository's pages, which show the full study; leave out --quick"
        )
    study = QUICK if args.quick else FULL
    os.chdir(ROOT)
    results = Results(args.results or study.results)
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
    if num_workers < 1:
        raise UserError(f"--workers: must be at least 1, not {num_workers}")
    clock = Clock(None if args.time_limit is None else 60 * args.time_limit)
    for model in study.models:
        check_equal_totals(model.budget)
    if args.propose_again:
        results.proposals = {}
    locks = [_lock(path) for path in (study.folder, results.path)]
    cores = 1 if num_gpus() else max(1, default_workers() // num_workers)
    workers = Workers(num_workers, cores)
    try:
        failures = _train(runs, study, results, workers, clock)
    finally:
        workers.close()
        if results.current(study)[0]:
            announce("the page")
            for path in write_report(results, study, study.folder):
                print(path)
        for lock in locks:
            lock.release()
    if failures:
        raise UserError(f"{len(failures)} runs failed; first: {failures[0]}")


def _lock(path: Path) -> FileLock:
    """Locks a folder or file of results against a second study, by a file among temporary ones."""
    name = f"transfer_study_{digest_of(str(path.resolve()))}.lock"
    lock = FileLock.acquire(Path(tempfile.gettempdir(), name), for_writing=True)
    if lock is None:
        raise UserError(f"{path}: another study is writing there; wait until it is done")
    return lock


def _train(
    runs: Sequence[Run], study: Study, results: Results, workers: Workers, clock: Clock
) -> list[str]:
    """Trains what is missing, and returns the errors of what failed.

    A model is prepared before the first of its runs that is missing, and the proposed schedule
    follows from all runs before it.
    """
    prepared: dict[str, Prepared] = {}
    failures: list[str] = []
    for (name, is_proposed), part in groupby(runs, lambda run: (run.model, run.is_proposed)):
        wanted, model = list(part), study.model(name)
        try:
            if not missing_runs(wanted, study, results):
                continue  # by what is recorded of the model, which need not be prepared
            if name not in prepared:
                prepared[name] = prepare(model, study, results, clock)
            if is_proposed:
                before = [run for run in plan(study) if run.model == name]
                before = before[: next(k for k, run in enumerate(before) if run.is_proposed)]
                if unfinished := missing_runs(before, study, results):
                    print(f"{name}: nothing is proposed before {len(unfinished)} runs", flush=True)
                    continue
                announce(f"{name}: the schedule that the fit proposes")
                propose(results, study, model)
            missing = missing_runs(wanted, study, results, prepared[name].weights)
            announce(f"{name}: {len(missing)} of {len(wanted)} runs are missing")
            failures += train_all(missing, study, prepared[name], results, workers, clock)
        except OutOfTimeError:
            print(f"time limit: {name}: not prepared", flush=True)
        except UserError as error:
            failures.append(f"{name}: {error}")
            print(failures[-1], flush=True)
    return failures


def list_runs(runs: Sequence[Run], study: Study, results: Results) -> list[str]:
    """Returns a line for each run, and the time that is left.

    The time is that of the finished runs of the same model, or an estimate before there are any.
    """
    lines, clock, left = [], Clock(), 0.0
    current = results.current(study)[0].values()
    done = {Run.of(entry) for entry in current}
    for run in runs:
        if run in done:
            lines.append(f"done     {run.key}")
            continue
        seconds = clock.estimate(run, study, results)
        left += seconds
        why = ""
        if run.key in results.entries:
            is_trained = bool(results.of_run(run, study))
            what = "evaluation" if is_trained else "configuration"
            why = f" (its {what} has changed)"
        lines.append(f"remains  {run.key}  {seconds / 60:.1f} minutes of a worker{why}")
    cores = default_workers()
    lines.append(
        f"{sum(run in done for run in runs)} of {len(runs)} runs are done; about "
        f"{left / 3600:.1f} worker-hours remain, {left / 3600 / cores:.1f} hours with {cores} "
        "workers, without the foundations"
    )
    return lines


if __name__ == "__main__":
    run_main(main)
