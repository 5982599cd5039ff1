"""Creates the images of the README and the documentation."""

from megatron_chatflow.errors import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # the imports below take seconds

import argparse
import io
import shutil
import subprocess
from pathlib import Path

import numpy as np

from megatron_chatflow.errors import ArgumentParser, UserError, run_main
from megatron_chatflow.files import check_output_file, scratch_folder, write_output_file
from megatron_chatflow.report.data import (
    SAMPLES,
    RunMetrics,
    XAxis,
    read_run,
    realised_shares,
    samples_per_record,
)
from megatron_chatflow.report.page import write_report
from megatron_chatflow.report.plots import (
    format_count,
    import_matplotlib,
    readable_labels,
    to_png,
)

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
EXAMPLES = """examples:
  python tools/docs_pictures.py report runs/tiny_cpu/chatflow --output docs/images/report.png
  python tools/docs_pictures.py blend runs/tiny_cpu/chatflow --output docs/images/blend.png
  python tools/docs_pictures.py pipeline --output docs/images/pipeline.png
"""

# Steps of the data path: what each step holds, what produces the next, and where the code is.
STEPS = (
    ("Text", "JSON lines, Parquet,\npairs, chats", ""),
    ("Datasets", ".bin .idx .json\nloss masks", "preprocess/\ntokenizer/"),
    ("Samples", "windows, packing,\none order per epoch", "data/"),
    ("Global batches", "source and index\nof every sample", "blend/"),
    ("Training", "megatron-core\nTP PP CP DP", "training/\nmodel/"),
    ("Checkpoints", "any layout,\nasynchronous", "checkpoint/"),
    ("Hugging Face", "weights, tokenizer,\nchat template", "convert/"),
)


def main() -> None:
    """Parses the command line and creates an image."""
    parser = ArgumentParser(
        description="Creates an image for the documentation.",
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
            "run_dir", type=Path, metavar="RUN_DIR", help="--save folder of the run"
        )
        picture.add_argument("--output", type=Path, required=True, help="the PNG file")
        if name == "report":
            picture.add_argument("--width", type=int, default=1280, help="pixels (default: 1280)")
            picture.add_argument("--height", type=int, default=1500, help="pixels (default: 1500)")
    text = "data flow from text to a Hugging Face folder, drawn with matplotlib"
    picture = pictures.add_parser("pipeline", help=text, description=text)
    picture.add_argument("--output", type=Path, required=True, help="the PNG file")
    args = parser.parse_args()
    check_output_file(args.output)
    if args.picture == "report":
        png = take_screenshot(args.run_dir, args.width, args.height)
    elif args.picture == "blend":
        png = plot_blend(read_run(args.run_dir))
    else:
        png = draw_pipeline()
    write_output_file(args.output, png)
    print(f"wrote {args.output} ({len(png) / 1e3:,.0f} kB)")


def plot_blend(run: RunMetrics) -> bytes:
    """Draws the planned weights of a run as lines and its realised shares as steps.

    Each step is the mean over a thirtieth of the run, weighted by the number of drawn samples.

    The image is a PNG of 1600 pixels. Text is readable at half this size.
    """
    import_matplotlib()
    from matplotlib.figure import Figure

    if not run.sources:
        raise UserError(f"{run.folder}: its metrics contain no sources; give another run")
    axis, samples = XAxis.of(run, SAMPLES), samples_per_record(run)
    families, labels = readable_labels(list(run.sources))
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    bounds = np.unique(np.linspace(0, len(axis.x), 31).astype(np.int64))
    edges = np.concatenate(([0.0], axis.x[bounds[1:] - 1]))
    weights = np.add.reduceat(samples, bounds[:-1])
    for k, (label, block) in enumerate(zip(labels, run.sources.values(), strict=True)):
        share = np.nan_to_num(realised_shares(run)[list(run.sources)[k]])
        steps = np.add.reduceat(share * samples, bounds[:-1]) / weights
        axes.stairs(steps, edges, baseline=None, color=f"C{k}", alpha=0.55, linewidth=2)
        planned = np.nan_to_num(block["weight"])
        axes.plot(axis.x, planned, color=f"C{k}", linewidth=1.8, label=label)
    axes.plot([], [], color="grey", linewidth=1.8, label="planned weight")
    axes.stairs([], [0], color="grey", alpha=0.55, linewidth=2, label="realised share")
    axes.set_xlabel("samples")
    axes.set_ylabel("share of samples")
    axes.xaxis.set_major_formatter(format_count)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_xlim(0, float(axis.x[-1]))
    axes.set_ylim(0, None)
    axes.grid(alpha=0.3)
    fonts = {"family": families, "size": "medium"}
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, prop=fonts)
    return to_png(figure, 200)


def draw_pipeline() -> bytes:
    """Draws the steps from text to a Hugging Face folder.

    Returns:
        A PNG of 1600 x 360 pixels.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    except ImportError:
        raise UserError("matplotlib: is not installed; run pip install matplotlib") from None
    figure = Figure(figsize=(16, 3.6), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 16), ylim=(0.6, 4.2))
    axes.axis("off")
    distance, width = 16 / len(STEPS), 1.8
    for k, (name, content, folders) in enumerate(STEPS):
        left = k * distance + (distance - width) / 2
        box = FancyBboxPatch(
            (left, 1.5),
            width,
            1.7,
            boxstyle="round,pad=0.05,rounding_size=0.12",
            facecolor="#eaf1fb" if k not in (3, 4) else "#fdeedd",
            edgecolor="#35506f",
            linewidth=1.5,
        )
        axes.add_patch(box)
        middle = left + width / 2
        axes.text(middle, 2.85, name, ha="center", va="center", fontsize=14, weight="bold")
        axes.text(middle, 2.1, content, ha="center", va="center", fontsize=12.5)
        axes.text(
            middle, 1.32, folders, ha="center", va="top", fontsize=12, family="monospace",
            color="#35506f",
        )  # fmt: skip
        if k:
            arrow = FancyArrowPatch(
                (left - distance + width + 0.06, 2.35),
                (left - 0.06, 2.35),
                arrowstyle="-|>",
                mutation_scale=16,
                color="#35506f",
            )
            axes.add_patch(arrow)
    middle = 3.5 * distance
    axes.text(middle, 3.9, "schedule", ha="center", va="center", fontsize=14, style="italic")
    axes.add_patch(
        FancyArrowPatch(
            (middle, 3.72), (middle, 3.27), arrowstyle="-|>", mutation_scale=16, color="#c06a12"
        )
    )
    stream = io.BytesIO()
    canvas.print_png(stream)
    return stream.getvalue()


def take_screenshot(run_dir: Path, width: int, height: int) -> bytes:
    """Captures the top of a run's report as a picture.

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
        raise UserError("chromium: is not installed; run apt-get install chromium")
    with scratch_folder("report") as scratch:
        page, picture = scratch / "report.html", scratch / "report.png"
        write_report([run_dir], page)
        command = [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *(f"--user-data-dir={scratch / 'profile'}", f"--window-size={width},{height}"),
            # Charts are drawn before the screenshot is taken, however slow the machine is.
            *("--virtual-time-budget=20000", f"--screenshot={picture}", page.as_uri()),
        ]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode or not picture.is_file():
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise UserError(f"{browser}: could not take a screenshot of {page}: {lines[-1]}")
        return picture.read_bytes()


if __name__ == "__main__":
    run_main(main)
