"""``chatflow plan``: shows the mixture that a run's schedule will draw before training starts."""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_chatflow.blend.blend import Blend
from megatron_chatflow.blend.controllers import (
    NUM_INITIAL,
    controlled_blend,
    fixed_schedule,
    refuse_missing_controller,
)
from megatron_chatflow.blend.edits import as_planned_knot, run_positions, run_schedule
from megatron_chatflow.blend.objective import ObjectiveWeights
from megatron_chatflow.blend.plan import (
    check_epochs,
    decision_table,
    epoch_findings,
    learning_rate_table,
    mixture_curve,
    objective_table,
    plan,
    to_csv,
    to_table,
)
from megatron_chatflow.blend.schedule import Schedule
from megatron_chatflow.checkpoint.decisions import read_decisions
from megatron_chatflow.checkpoint.files import read_state, resolve_checkpoint
from megatron_chatflow.config import RunConfig, RunLength, load_config
from megatron_chatflow.config.fields import parse_count
from megatron_chatflow.config.yaml_file import dump_yaml, read_yaml
from megatron_chatflow.data.source import Source, build_sources, token_epochs
from megatron_chatflow.errors import ArgumentParser, UserError
from megatron_chatflow.files import check_output_file, write_output_file
from megatron_chatflow.report.plots import plot_mixture
from megatron_chatflow.runtime.table import format_table
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.training.remote_inputs import fetch_sources

OUTPUTS = ("plan.csv", "plan.png")
DESCRIPTION = """Shows the mixture that a run's schedule will draw, before training.

Prints the planned and the realised mixture of every phase, and the epochs of every source. With
--output, also writes them as CSV and plots the whole run as PNG. If --load of the run holds a
checkpoint, the plan continues from it, as training would. --at prints the weights at one point of
the run and the knot that keeps the schedule unchanged up to that point, which can be pasted into
the YAML file before an edit. --from-run prints the schedule with the weights that the controller of
a run decided.
"""
EXAMPLES = """examples:
  %(prog)s --config run.yaml
  %(prog)s --config run.yaml --output plans/ --train-iters 20000
  %(prog)s --config run.yaml --at now
  %(prog)s --from-run runs/odm > schedule.yaml
"""


def open_sources(config: RunConfig) -> list[Source]:
    """Opens the training sources; returns none if the data cannot be read yet.

    Raises:
        UserError: The data cannot be read, and the schedule counts its tokens.
    """
    try:
        fetch_sources(config)
        tokenizer = load_tokenizer(
            config.tokenizer.tokenizer_model, config.tokenizer.tokenizer_type
        )
        return build_sources(config.data, seed=config.train.seed, tokenizer=tokenizer)
    except UserError as error:
        if config.data.schedule.count != "samples":
            raise
        print(f"not showing epochs: {error}", file=sys.stderr)
        return []


@dataclass(frozen=True)
class Resumed:
    """The blend state in the checkpoint that a run continues from."""

    folder: Path
    iteration: int
    consumed_samples: int
    blend: dict[str, Any]
    schedule: dict[str, Any]


def find_resumed(config: RunConfig) -> Resumed | None:
    """Returns the checkpoint that the run would continue from; None for a new run."""
    settings = config.checkpoint
    if settings.load is None or settings.finetune:
        return None
    folder = resolve_checkpoint(settings.load)
    state = {} if folder is None else read_state(folder)
    names = ("iteration", "consumed_samples", "blend", "schedule")
    if folder is None or not all(name in state for name in names) or not state["blend"]:
        return None
    return Resumed(folder, *(state[name] for name in names))


def numeric_knot(schedule: Schedule, sample: int, unit: str, more: str = "") -> str:
    """Returns the weights at a sample as a YAML knot that rounds to exactly these weights.

    ``more`` is inserted behind the weights.
    """
    # Parsing a knot rounds its levels down. Rounding up here yields the same levels again.
    levels = np.cumsum(schedule.weights_at(sample, as_written=True)).tolist()
    parts = [-(-level * 10**10 >> 32) for level in levels]
    weights = {
        name: (above - below) / 10**10
        for name, below, above in zip(schedule.sources, [0, *parts[:-1]], parts, strict=True)
        if above > below
    }
    inner = ", ".join(f"{name}: {weight:.10g}" for name, weight in weights.items())
    text = f"at: {schedule.position(sample, unit)}, weights: {{{inner}}}{more}"
    following = next((knot for knot in schedule.knots if knot.at >= sample), None)
    if following is None or following == schedule.knots[0] or following.ramp == "step":
        return f"{{{text}}}"
    text = f"{{{text}, ramp: {following.ramp}}}"
    if following.ramp == "cosine" and (following.at > sample or following.towards):
        text += "  # starts a shorter cosine ramp: the weights before this knot change"
    return text


def describe_position(
    blend: Blend, objective: ObjectiveWeights, sample: int, unit: str, resumed: Resumed | None
) -> str:
    """Describes the weights at a sample and a knot that preserves the schedule up to it.

    ``unit`` is that of the knots in the YAML file, and ``resumed`` the checkpoint that the run
    continues from; None for a new run.
    """
    schedule = blend.schedule
    more = ""
    if not objective.are_equal:
        counts = zip(objective.sources, objective.at(sample), strict=True)
        inner = ", ".join(f"{name}: {weight:.10g}" for name, weight in counts)
        more = f", objective_weights: {{{inner}}}"
    shares = zip(schedule.sources, blend.planned_shares(sample).tolist(), strict=True)
    place = f"sample {sample:,}"
    if unit != "samples":
        place += f" ({schedule.position(sample, unit):,} {unit})"
    count = "" if schedule.count == "samples" else " as shares of samples"
    lines = [
        f"weights at {place}{count}: " + ", ".join(f"{name} {part:.6g}" for name, part in shares)
    ]
    kept = ""
    if resumed is not None:
        lines += [
            f"to keep the schedule of {resumed.folder} up to this sample, replace all knots up to "
            "it by this knot:",
            f"      - {as_planned_knot(schedule, sample, unit)[:-1]}{more}}}",
        ]
        kept = " (keep the knots before it)"
    lines += [
        f"the same knot with numeric weights{kept}:",
        f"      - {numeric_knot(schedule, sample, unit, more)}",
    ]
    if resumed is None:
        lines.append("(a run that resumes from a checkpoint can use `weights: as_planned` instead)")
    else:
        # The objective has no recorded weights: before its first knot it has those of this knot.
        begin = resumed.consumed_samples
        between = {begin, *(at for at in objective.samples_before(sample) if at > begin)}
        if any(objective.at(at) != objective.at(sample) for at in between if at < sample):
            lines.append(
                f"warning: with as_planned, sources count by its objective_weights from sample "
                f"{begin:,} on already; use the knot of --at now to keep those before"
            )
    if objective.is_on_cosine_ramp(sample):
        lines.append(
            "warning: objective_weights are on a cosine ramp here, and this knot starts another "
            "one to the next knot, so later objective_weights change"
        )
    return "\n".join(lines)


def recorded_objective_weights(folder: Path) -> dict[str, float] | None:
    """Returns the ``objective_weights`` of a controlled run's knot; None without any.

    ``folder`` is that of the run or of one of its checkpoints; both have a ``config.yaml``.
    """
    path = folder / "config.yaml"
    try:
        (knot,) = read_yaml(path)["data"]["schedule"]["knots"] if path.is_file() else [{}]
        weights = knot.get("objective_weights")
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: has no data.schedule with a single knot; restore it") from None
    return weights or None


def parse_position(text: str, resumed: Resumed | None) -> int:
    """Parses the value of ``--at``, a number of samples or ``now``, to a global sample."""
    if text != "now":
        try:
            sample = int(text) if text.isdigit() else parse_count(text)
        except UserError as error:
            raise UserError(f"--at: {error}; or use now") from None
        if sample < 0:
            raise UserError(f"--at: must not be negative, but is {text}")
        return sample
    if resumed is None:
        raise UserError(
            "--at: now needs a run with a checkpoint: set its folder with --load, or give a sample"
        )
    return resumed.consumed_samples


def main() -> None:
    """Prints the plan and writes its files. With ``--at``, only prints the weights at one point."""
    parser = ArgumentParser(DESCRIPTION, EXAMPLES)
    parser.add_argument("--config", type=Path, help="path of the run's YAML file")
    parser.add_argument(
        "--from-run",
        metavar="RUN",
        type=Path,
        help="print, as YAML, the fixed schedule with the weights that the controller of this run "
        "(or checkpoint) decided, instead of a plan",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder in which plan.csv and plan.png are written; default: only print the plan",
    )
    parser.add_argument(
        "--at", metavar="now|SAMPLE", help="print only the weights and the knot at this point"
    )
    arguments, flags = parser.parse_known_args()
    if arguments.from_run is not None:
        if flags or any((arguments.config, arguments.output, arguments.at)):
            raise UserError("--from-run: takes no other options; remove them")
        found = read_decisions(arguments.from_run)
        weights = recorded_objective_weights(found.folder)
        block = fixed_schedule(found.sources, found.horizon, found.weights, weights)
        print(f"# the decisions in {found.folder}")
        print(dump_yaml({"data": {"schedule": block}}), end="")
        return
    if arguments.config is None:
        parser.error("--config is required, or --from-run")

    if arguments.output is not None:
        for name in OUTPUTS:
            check_output_file(arguments.output / name)
    config = load_config(arguments.config, flags)
    resumed = find_resumed(config)
    controller = config.data.schedule.controller
    if controller is not None:
        if arguments.output is not None or arguments.at is not None:
            raise UserError(
                "--output, --at: weights that a controller decides are not known ahead; use "
                "--from-run for those that were decided"
            )
        show_decisions(config, resumed)
        return
    sources = (
        [] if arguments.at and config.data.schedule.count == "samples" else open_sources(config)
    )
    epochs = token_epochs(config.data, sources)
    if resumed is not None:
        refuse_missing_controller(resumed.blend)
        progress = resumed.iteration, resumed.consumed_samples
        positions = run_positions(config, resumed.schedule, *progress)
    if resumed is None:
        positions = run_positions(config)
        blend = Blend(run_schedule(config, list(config.data.sources), epochs=epochs))
    elif (
        arguments.at is not None
    ):  # Use the schedule of the checkpoint. The YAML file may have changed since.
        schedule, batch = Schedule.from_dict(resumed.schedule), config.train.global_batch_size
        if schedule.unit == "iterations" and config.train.train_iters is not None:
            origin = resumed.consumed_samples - resumed.iteration * batch
            schedule = schedule.with_iterations(batch, origin)
        blend = Blend(schedule, resumed.blend)
    else:
        names = list(config.data.sources)
        schedule = run_schedule(config, names, resumed.schedule, *progress, epochs)
        blend = Blend(schedule, resumed.blend)
    objective = ObjectiveWeights(config.data, positions)
    if arguments.at is not None:
        sample = parse_position(arguments.at, resumed)
        print(describe_position(blend, objective, sample, config.data.schedule.unit, resumed))
        return
    sizes = {source.name: source.num_samples for source in sources}
    show_plan(config, blend, objective, sizes, resumed, arguments)


def show_decisions(config: RunConfig, resumed: Resumed | None) -> None:
    """Prints what is known of the weights of a run with a controller."""
    controller = config.data.schedule.controller
    assert controller is not None, "checked by the caller"
    if resumed is not None:
        blend = controlled_blend(config, resumed.schedule, resumed.blend)
        print(f"continues from {resumed.folder}, sample {resumed.consumed_samples:,}")
    elif controller.run is not None:
        blend = controlled_blend(config, decisions=read_decisions(controller.run))
    else:
        blend = controlled_blend(config)
        print(
            f"{controller.name} decides the weights every {blend.horizon:,} samples, and the first "
            f"{NUM_INITIAL * blend.horizon:,} samples have those of the knot; --dry-run checks "
            "floors, caps and max_epochs"
        )
    rows = decision_table(blend)
    if rows:
        print("\n" + format_table(rows))


def show_plan(
    config: RunConfig,
    blend: Blend,
    objective: ObjectiveWeights,
    sizes: Mapping[str, int],
    resumed: Resumed | None,
    arguments: argparse.Namespace,
) -> None:
    """Prints the plan of the whole run and writes ``plan.csv`` and ``plan.png``."""
    schedule, seq_length = blend.schedule, config.data.seq_length
    length = RunLength.of(config)
    if resumed is not None:
        first = int(resumed.blend["segments"][0]["schedule"]["samples_per_iteration"])
        length = RunLength.of(config, resumed.iteration, resumed.consumed_samples, first)
    length.check_learning_rate(config.optimizer)
    num_samples = length.num_samples
    rows = plan(blend, num_samples, sizes)
    shown = f"{num_samples:,} samples of {seq_length:,} tokens"
    if schedule.unit == "tokens":
        shown = f"{num_samples * seq_length:,} tokens ({shown})"
    print(f"{shown}, from {arguments.config}")
    if resumed is not None:
        print(f"continues from {resumed.folder}, sample {resumed.consumed_samples:,}")
    if blend.edit is not None:
        print(blend.edit)
    print("\n" + format_table(to_table(rows, blend)))
    if not objective.are_equal:
        counts = objective_table(objective, blend, num_samples)
        print("\nweights in the objective:\n" + format_table(counts))
    tenths = learning_rate_table(blend, config.optimizer, length)
    if tenths:
        print("\nsources by tenths of the summed learning rate:\n" + format_table(tenths))
    if arguments.output is not None:
        scale = {"tokens": float(seq_length)}
        if not schedule.iteration_origin:  # every iteration has the same size
            scale["iterations"] = 1 / schedule.samples_per_iteration
        png = plot_mixture(
            mixture_curve(blend, num_samples),
            schedule.sources,
            sizes,
            title=arguments.config.stem,
            unit=schedule.unit if schedule.unit in scale else "samples",
            unit_per_sample=scale.get(schedule.unit, 1),
        )
        contents = dict(zip(OUTPUTS, (to_csv(rows).encode(), png), strict=True))
        for name, content in contents.items():
            write_output_file(arguments.output / name, content)
        print(f"\nwrote {' and '.join(str(arguments.output / name) for name in contents)}")
    limits = {name: source.max_epochs for name, source in config.data.sources.items()}
    limited = {name: limit for name, limit in limits.items() if limit is not None and sizes}
    check_epochs(blend, length, sizes, limited)
    for finding in epoch_findings(blend, num_samples, sizes, limited):
        print(f"warning: {finding}", file=sys.stderr)
