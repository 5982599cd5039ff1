"""Draws finished or running runs as one HTML page.

In: run folders, as `--save` wrote them. Out: a self-contained page that is read offline.
"""

from megatron_chatflow.errors import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # the imports below take seconds

import argparse
from pathlib import Path

from megatron_chatflow.errors import ArgumentParser, UserError, run_main
from megatron_chatflow.files import check_output_file
from megatron_chatflow.report.page import follow_runs, write_report

EXAMPLES = """examples:
  python tools/plot_run.py runs/tiny_cpu/chatflow
  python tools/plot_run.py runs/a runs/b --output comparison.html
  python tools/plot_run.py runs/tiny_cpu/chatflow --follow
"""


def main() -> None:
    """Parses the command line and writes the page."""
    parser = ArgumentParser(
        description="Writes one HTML page with a run's plots, tables and configuration.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="what --save named"
    )
    parser.add_argument(
        "--output", type=Path, help="the page (default: report.html in the first run's folder)"
    )
    parser.add_argument(
        "--follow",
        nargs="?",
        type=float,
        const=30.0,
        metavar="SECONDS",
        help="write it anew while the runs go on (default: every 30 seconds), until Ctrl-C",
    )
    args = parser.parse_args()
    output = args.output or args.run_dirs[0] / "report.html"
    check_output_file(output)
    if args.follow is None:
        runs = write_report(args.run_dirs, output)
    elif 1 <= args.follow <= 86400:
        runs = follow_runs(args.run_dirs, output, args.follow, say=print)
    else:
        raise UserError(f"--follow: {args.follow:g} is not between 1 and 86400 seconds")
    size = output.stat().st_size / 1e3
    logged = sum(len(run.iteration) for run in runs)
    print(f"wrote {output} ({size:,.0f} kB, {logged:,} logged iterations of {len(runs)} run(s))")


if __name__ == "__main__":
    run_main(main)
