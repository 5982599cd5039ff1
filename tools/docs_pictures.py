"""Makes the pictures of the README and the documentation from a run's folder."""

from megatron_chatflow.errors import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # the imports below take seconds

import argparse
import shutil
import subprocess
from pathlib import Path

from megatron_chatflow.errors import ArgumentParser, UserError, run_main
from megatron_chatflow.files import check_output_file, scratch_folder, write_output_file
from megatron_chatflow.report.data import read_run
from megatron_chatflow.report.page import write_report
from megatron_chatflow.report.plots import plot_blend

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
EXAMPLES = """examples:
  python tools/docs_pictures.py report runs/tiny_cpu/chatflow --output docs/images/report.png
  python tools/docs_pictures.py blend runs/tiny_cpu/chatflow --output docs/images/blend.png
"""


def main() -> None:
    """Parses the command line and makes a picture."""
    parser = ArgumentParser(
        description="Makes a picture of a run for the documentation.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pictures = parser.add_subparsers(dest="picture", required=True, metavar="PICTURE")
    for name, text in (
        ("report", "screenshot of the run's report, taken with Chromium"),
        ("blend", "planned weights and realised shares, drawn with matplotlib"),
    ):
        picture = pictures.add_parser(name, help=text, description=text)
        picture.add_argument(
            "run_dir", type=Path, metavar="RUN_DIR", help="folder that --save named"
        )
        picture.add_argument("--output", type=Path, required=True, help="the PNG file")
        if name == "report":
            picture.add_argument("--width", type=int, default=1280, help="pixels (default: 1280)")
            picture.add_argument("--height", type=int, default=1500, help="pixels (default: 1500)")
    args = parser.parse_args()
    check_output_file(args.output)
    if args.picture == "report":
        png = take_screenshot(args.run_dir, args.width, args.height)
    else:
        png = plot_blend(read_run(args.run_dir))
    write_output_file(args.output, png)
    print(f"wrote {args.output} ({len(png) / 1e3:,.0f} kB)")


def take_screenshot(run_dir: Path, width: int, height: int) -> bytes:
    """Takes a screenshot of the top of a run's report.

    Args:
        run_dir: The run's folder.
        width: Pixels of the window.
        height: Pixels of the window.

    Returns:
        A PNG.

    Raises:
        UserError: Chromium is missing or fails, or the folder is not a run.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise UserError(
            "chromium: is not installed, and the screenshot needs it: apt-get install chromium"
        )
    with scratch_folder("report") as scratch:
        page, picture = scratch / "report.html", scratch / "report.png"
        write_report([run_dir], page)
        command = [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *(f"--user-data-dir={scratch / 'profile'}", f"--window-size={width},{height}"),
            # Charts are drawn before the picture is taken, however slow the machine is.
            *("--virtual-time-budget=20000", f"--screenshot={picture}", page.as_uri()),
        ]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode or not picture.is_file():
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise UserError(f"{browser}: took no screenshot of {page}: {lines[-1]}")
        return picture.read_bytes()


if __name__ == "__main__":
    run_main(main)
