#!/usr/bin/env python
"""Shows what a run's schedule will do, before it is trained.

In: a run's configuration. Out: a table of planned against realised mixture per phase with the
epochs of every source; with --output the same as CSV, and a plot of the whole run as PNG.
"""

import argparse
import sys
from pathlib import Path

from megatron_chatflow.config import RunConfig, load_config, to_plain
from megatron_chatflow.data.blend import Blend
from megatron_chatflow.data.plan import (
    check_epochs,
    epoch_findings,
    mixture_curve,
    plan,
    to_csv,
    to_table,
)
from megatron_chatflow.data.schedule import Schedule
from megatron_chatflow.data.source import build_sources
from megatron_chatflow.data.staged_file import StagedFile, publish_all
from megatron_chatflow.errors import ArgumentParser, UserError, run_main
from megatron_chatflow.evaluation.plots import plot_mixture
from megatron_chatflow.evaluation.report_table import format_table
from megatron_chatflow.tokenizer import load_tokenizer

EXAMPLES = """examples:
  python tools/plan_blend.py --config run.yaml
  python tools/plan_blend.py --config run.yaml --output plans/ --train-iters 20000
"""


def epoch_sizes(config: RunConfig) -> dict[str, int]:
    """Samples in an epoch of each source; none of them where the data is not there yet."""
    try:
        tokenizer = load_tokenizer(
            config.tokenizer.tokenizer_model, config.tokenizer.tokenizer_type
        )
        sources = build_sources(config.data, seed=config.train.seed, tokenizer=tokenizer)
    except UserError as error:
        print(f"epochs are left out: {error}", file=sys.stderr)
        return {}
    return {source.name: source.num_samples for source in sources}


def main() -> None:
    """Parses the command line, prints the table and writes the files."""
    parser = ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="the run's YAML file")
    parser.add_argument("--output", type=Path, help="folder for plan.csv and plan.png")
    arguments, flags = parser.parse_known_args()

    config = load_config(arguments.config, flags)
    train, data = config.train, config.data
    schedule = Schedule.from_dict(
        to_plain(data.schedule),
        sources=list(data.sources),
        samples_per_iteration=train.global_batch_size,
        seq_length=data.seq_length,
    )
    num_samples = train.train_samples or (train.train_iters or 0) * train.global_batch_size
    blend, sizes = Blend(schedule), epoch_sizes(config)
    rows = plan(blend, num_samples, sizes)
    print(f"{num_samples:,} samples of {data.seq_length:,} tokens, from {arguments.config}\n")
    print(format_table(to_table(rows)))
    if arguments.output is not None:
        curve = mixture_curve(blend, num_samples)
        png = plot_mixture(curve, schedule.sources, sizes, title=arguments.config.stem)
        contents = {"plan.csv": to_csv(rows).encode(), "plan.png": png}
        files = [StagedFile(arguments.output / name) for name in contents]
        for file, content in zip(files, contents.values(), strict=True):
            file.write(content)
        publish_all(files)
        print(f"\nwrote {' and '.join(str(file.path) for file in files)}")
    limits = {name: source.max_epochs for name, source in data.sources.items()}
    limited = {name: limit for name, limit in limits.items() if limit is not None and sizes}
    check_epochs(blend, num_samples, sizes, limited, train.global_batch_size)
    for finding in epoch_findings(blend, num_samples, sizes, limited):
        print(f"warning: {finding}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
