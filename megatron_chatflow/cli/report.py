"""``chatflow report``: writes finished runs or runs in progress as one HTML page."""

from pathlib import Path

from megatron_chatflow.errors import ArgumentParser, UserError
from megatron_chatflow.files import check_output_file
from megatron_chatflow.report.page import follow_runs, write_report

EXAMPLES = """examples:
  %(prog)s runs/tiny_cpu/chatflow
  %(prog)s runs/a runs/b --output comparison.html
  %(prog)s runs/tiny_cpu/chatflow --follow
"""


def main() -> None:
    """Writes the page once, or with ``--follow`` repeatedly until the runs end."""
    parser = ArgumentParser(
        "Writes plots, tables and configuration of runs as one HTML page.", EXAMPLES
    )
    parser.add_argument(
        "run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="--save folder of a run"
    )
    parser.add_argument(
        "--output", type=Path, help="file to write (default: report.html in the first run's folder)"
    )
    parser.add_argument(
        "--follow",
        nargs="?",
        type=float,
        const=30.0,
        metavar="SECONDS",
        help="keep updating the page until Ctrl-C (default: every 30 seconds)",
    )
    args = parser.parse_args()
    output = args.output or args.run_dirs[0] / "report.html"
    check_output_file(output)
    if args.follow is None:
        runs = write_report(args.run_dirs, output)
    elif 1 <= args.follow <= 86400:
        runs = follow_runs(args.run_dirs, output, args.follow, say=print)
    else:
        raise UserError(f"--follow: must be between 1 and 86400 seconds, not {args.follow:g}")
    size = output.stat().st_size / 1e3
    logged = sum(len(run.iteration) for run in runs)
    print(f"wrote {output} ({size:,.0f} kB, {logged:,} logged iterations of {len(runs)} run(s))")
