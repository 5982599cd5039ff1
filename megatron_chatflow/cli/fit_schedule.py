"""``chatflow fit-schedule``: proposes a schedule from the results of short runs."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_chatflow.blend.fit import (
    NUM_PARTS,
    FloatArray,
    Observation,
    Proposal,
    RecencyFit,
    fit_recency,
    merge_replicates,
    propose_schedule,
    read_runs,
    schedule_block,
)
from megatron_chatflow.config import RunConfig, RunLength, load_config
from megatron_chatflow.config.fields import parse_count
from megatron_chatflow.config.learning_rate import learning_rates
from megatron_chatflow.config.yaml_file import dump_yaml
from megatron_chatflow.errors import ArgumentParser, UserError
from megatron_chatflow.files import check_output_file, write_output_file
from megatron_chatflow.runtime.table import format_table

DESCRIPTION = """Proposes a schedule from the results of short runs.

Fits how their final validation losses depend on what each run read, when, and at which learning
rate, and searches the schedule of another run that is predicted to be best.

The runs should differ in their schedules and have the model, the start and the validation data in
common; 16 short runs with random knots are the least for four sources. The length, the learning
rate and the sources of the proposal are those of --config, whose schedule does not matter. Prints
the predicted losses with intervals of two standard deviations, beside the error of predicting each
run from all others. Says for which sources the proposal is farther off than all runs.
"""
EXAMPLES = """examples:
  %(prog)s runs/random_* --config run.yaml --goal chinese=2 english=1 --output schedule.yaml
  %(prog)s runs/random_* --config run.yaml --goal chinese=1 --max-tokens instruction=5M
  %(prog)s examples/transfer_study/results.json --model small --config run.yaml --goal chinese=1
"""
_LEARNING_RATES = 100_000


def main() -> None:
    """Fits the runs, prints the proposal and writes it."""
    args = _parse()
    if args.output:
        check_output_file(args.output)
    if args.model and all(path.is_dir() for path in args.runs):
        raise UserError("--model: chooses among the models of a results.json; leave it out")
    goal = _numbers(args.goal, "--goal", float)
    bounds = _numbers(args.max_tokens, "--max-tokens", _count)
    config = load_config(args.config)
    known = tuple(config.data.sources)
    every = [run for path in args.runs for run in read_runs(path, args.model)]
    runs = [run for run in every if run.is_mixture]
    for run in every:
        if not run.is_mixture:
            print(f"note: {run.name}: reads a single source, so it is left out of the fit")
    if not runs:
        raise UserError("no run reads more than one source; give runs of different mixtures")
    read = {name for run in runs for name in run.read}
    sources = tuple(name for name in known if name in read)
    if unknown := (read - set(known)) | (set(bounds) - set(sources)):
        raise UserError(
            f"{args.config}: the source {min(unknown)} is not one that both the configuration and "
            "the runs have; use the configuration of the runs"
        )
    observations = merge_replicates([run.observation(sources) for run in runs])
    fit = fit_recency(observations, sources)
    length = RunLength.of(config)
    num_tokens = float(length.num_samples * config.data.seq_length)
    rates = mean_learning_rates(config, length)
    proposal = propose_schedule(
        fit, goal, rates, num_tokens, max_tokens=bounds, caution=args.caution, num_knots=args.knots
    )
    block = schedule_block(proposal, sources, length.last_iteration)
    predicted = fit.predict(proposal.trajectory)
    different = "" if len(observations) == len(runs) else f", {len(observations)} different ones"
    print(f"{len(runs)} runs{different}; losses are bits per byte of the validation")
    print(format_table(_rows(fit, predicted, goal)))
    if names := [name for name, one in fit.targets.items() if one.sigma >= one.spread]:
        print(
            f"note: the fit predicts {', '.join(names)} no better than the mean of the runs does; "
            "add runs, with other schedules"
        )
    print(_goal_line(fit, observations, proposal, goal, bounds))
    if proposal.outside:
        print(
            f"note: because of --max-tokens, no run had such shares of "
            f"{', '.join(proposal.outside)}: the prediction extrapolates"
        )
    ratio = float(rates.max()) / fit.peak
    if not 0.8 < ratio < 1.25:
        print(
            f"note: the highest learning rate is {ratio:.3g} times that of the runs, so the "
            "prediction extrapolates"
        )
    if names := fit.extrapolated(proposal.trajectory):
        print(
            f"note: the schedule is farther from the runs than these are from each other: the "
            f"prediction extrapolates for {', '.join(names)}"
        )
    shares = proposal.trajectory.tokens.sum(axis=0) / num_tokens
    print("tokens: " + ", ".join(f"{n} {s:.1%}" for n, s in zip(sources, shares, strict=True)))
    text = dump_yaml({"data": {"schedule": block}})
    if args.output:
        write_output_file(args.output, text)
        print(f"{args.output}: the schedule; put it into {args.config}")
    else:
        print(text, end="")


def _parse() -> argparse.Namespace:
    parser = ArgumentParser(DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folder of a finished run, or results.json of examples/transfer_study",
    )
    add("--config", type=Path, required=True, metavar="YAML", help="the run to propose one for")
    add(
        "--goal",
        nargs="+",
        required=True,
        metavar="SOURCE=WEIGHT",
        help="weights of the logarithms of validation losses, whose mean is minimized",
    )
    add(
        "--max-tokens",
        nargs="+",
        default=[],
        metavar="SOURCE=TOKENS",
        help="how many tokens of a source may be drawn; default: any number",
    )
    add("--model", metavar="NAME", help="the model whose results are used, of results.json")
    add(
        "--knots",
        type=int,
        default=5,
        help="number of knots, 1 for a static mixture; default: %(default)s",
    )
    add(
        "--caution",
        type=float,
        default=1.0,
        metavar="X",
        help="standard deviations added to a prediction; default: %(default)s",
    )
    add("--output", type=Path, metavar="YAML", help="file for the schedule; default: print it")
    args = parser.parse_args()
    if args.knots < 1:
        raise UserError(f"--knots: must be at least 1, not {args.knots}")
    if not 0 <= args.caution < 100:
        raise UserError(f"--caution: must be from 0 to 100, not {args.caution:g}")
    return args


def mean_learning_rates(config: RunConfig, length: RunLength) -> FloatArray:
    """Returns the mean learning rate of equal parts of a run, float64[num_parts]."""
    last = length.last_iteration
    num_parts = min(NUM_PARTS, last)
    # In a longer run, the rate of some iterations stands for those between them.
    iterations = np.unique(np.linspace(0, last - 1, min(last, _LEARNING_RATES)).astype(np.int64))
    places = (
        length.batch_sizes.samples_after(0, iterations) if length.counts_samples else iterations
    )
    rates = learning_rates(config.optimizer, length, places - length.lr_start)
    parts = np.array_split(rates, num_parts)
    return np.array([part.mean() for part in parts])


def _numbers(texts: list[str], flag: str, convert: Callable[[str], float]) -> dict[str, float]:
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            if not name or not equals:
                raise ValueError
            found[name] = convert(value)
        except ValueError:
            raise UserError(f"{flag}: {text!r} is not SOURCE=NUMBER") from None
        if not 0 <= found[name] < float("inf"):
            raise UserError(f"{flag}: {text!r} must have a number of at least 0")
    return found


def _count(text: str) -> float:
    return float(text if text.isdecimal() else parse_count(text))


def _goal_line(
    fit: RecencyFit,
    observations: Sequence[Observation],
    proposal: Proposal,
    goal: Mapping[str, float],
    bounds: Mapping[str, float],
) -> str:
    """Returns the predicted goal beside that of the best run of about the same length.

    Runs that read more of a source than there is are no alternative.
    """
    mean, deviation = fit.predict_goal(proposal.trajectory, goal)
    low, high = mean - 2 * deviation, mean + 2 * deviation
    line = f"goal, the mean of log losses: predicted {mean:.4f} ({low:.4f} to {high:.4f})"
    most = [bounds.get(name, math.inf) for name in fit.sources]
    length, total = proposal.trajectory.tokens.sum(), sum(goal.values())
    found = {
        one.name: sum(weight * math.log(one.losses[name]) for name, weight in goal.items()) / total
        for one in observations
        if 0.8 < one.trajectory.tokens.sum() / length < 1.25
        and np.all(one.trajectory.tokens.sum(axis=0) <= most)
    }
    if not found:
        return line
    best = min(found, key=found.__getitem__)
    known = "" if high < found[best] else ", so the proposal is not known to be better"
    return f"{line}; the best run, {best}, has {found[best]:.4f}{known}"


def _rows(
    fit: RecencyFit, predicted: Mapping[str, tuple[float, float, float]], goal: Mapping[str, float]
) -> list[dict[str, str | float | int | None]]:
    return [
        {
            "source": name,
            "goal": goal.get(name, 0.0),
            "predicted": f"{value:.4f}",
            "interval": f"{low:.4f} to {high:.4f}",
            "error of one run": f"{100 * fit.targets[name].sigma:.2f} %",
            "spread of runs": f"{100 * fit.targets[name].spread:.2f} %",
            "forgotten over": f"{fit.targets[name].span:,.0f} tokens",
            "lasting part": f"{fit.targets[name].lasting:.0%}",
        }
        for name, (value, low, high) in predicted.items()
    ]
