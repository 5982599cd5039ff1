"""``chatflow plan-layout``: ranks the parallel layouts of a run by their predicted speed."""

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_chatflow.config import RunConfig, load_config, parse_count, validate_for_world
from megatron_chatflow.errors import ArgumentParser, UserError
from megatron_chatflow.files import check_output_file, write_output_file
from megatron_chatflow.runtime.table import Row, format_table
from megatron_chatflow.simulate.layout_search import (
    CALIBRATED_BAND,
    DEFAULT_GPU,
    MEMORY_SHARE,
    TIE,
    UNTUNED_BAND,
    PlannedLayout,
    calibrate,
    offloading_of,
    plan_layout,
    search_layouts,
    vocab_size_of,
)
from megatron_chatflow.simulate.step_time import GPUS, find_gpu

DESCRIPTION = """Ranks the parallel layouts of a run by their predicted speed, without any GPU.

Tries every valid layout that fits in memory with the run's global batch and sequence length. The
speeds are predictions, not measurements; see the page "Choosing a layout" of the documentation.
Other arguments are flags of the run, such as --global-batch-size 512.
"""
EXAMPLES = """examples:
  %(prog)s --config run.yaml --gpus 64,256 --gpu h100
  %(prog)s --config run.yaml --gpus 64 --gpu a100-80 --network-gbps 200 --tokens 8B --price 2.5
  %(prog)s --config run.yaml --gpus 64 --calibrate runs/x/metrics.jsonl --output best.yaml
"""


def parse_gpu_counts(text: str) -> list[int]:
    """Parses the value of ``--gpus``, numbers of GPUs with commas between them."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--gpus: must be numbers of GPUs such as 64 or 64,256, not {text!r}")
    return [int(part) for part in parts]


def report_layouts(
    found: Sequence[PlannedLayout],
    own: PlannedLayout | None,
    costs: tuple[int, float | None],
    band: tuple[float, float],
    num_shown: int,
) -> str:
    """Returns the table of the first layouts, the fastest one and the file's own.

    ``found`` has the order of `search_layouts` and is not empty; ``costs`` are the number of tokens
    to train on and the price of a GPU for one hour, if it is known; ``band`` is the speed that may
    be expected, relative to the prediction.
    """
    num_tokens, price = costs
    fastest = min(found, key=lambda layout: layout.seconds)
    num_tied = sum(layout.seconds < fastest.seconds * (1 + TIE) for layout in found)
    shown = [(str(rank), layout) for rank, layout in enumerate(found[:num_shown], 1)]
    if fastest not in found[:num_shown]:
        shown.append(("fastest", fastest))
    if own is not None:
        shown.append(("file", own))
    rows: list[Row] = []
    for rank, layout in shown:
        speed = layout.tokens_per_second / layout.num_gpus
        loss, share = layout.step.largest_loss
        hours = num_tokens / layout.tokens_per_second / 3600
        cost = {} if price is None else {"cost": round(hours * layout.num_gpus * price)}
        rows.append(
            {
                "rank": rank,
                "layout": layout.name,
                "GiB": f"{layout.memory / 2**30:.1f}",
                "s/step": f"{layout.seconds:.4g}",
                "tokens/s/GPU": round(speed),
                "from": round(band[0] * speed),
                "to": round(band[1] * speed),
                "MFU %": f"{100 * layout.mfu:.1f}",
                "days": f"{hours / 24:.2f}",
                "GPU-hours": round(hours * layout.num_gpus),
                **cost,
                "largest loss": f"{loss} {100 * share:.0f} %",
            }
        )
    text = format_table(rows)
    text += (
        f"\n{num_tied} layouts tie with the fastest, within {100 * TIE:.0f} %; the simplest one, "
        "and then the one with the least memory, comes first"
    )
    if own is not None:
        slower = 100 * (own.seconds / fastest.seconds - 1)
        text += f"\nthe layout in the file is predicted {slower:.1f} % slower than the fastest"
    return text


def best_yaml(best: PlannedLayout, gpu_name: str) -> str:
    """Returns the run with the recommended layout as YAML, with the prediction as a comment."""
    speed = best.tokens_per_second / best.num_gpus
    return (
        f"# {best.name} on {best.num_gpus} x {gpu_name}: predicted, not measured, to reach "
        f"{speed:,.0f} tokens/s per GPU\n# in {best.memory / 2**30:.1f} GiB.\n"
        + best.config.to_yaml()
    )


def output_path(path: Path, num_gpus: int, counts: Sequence[int]) -> Path:
    """Returns the file for a number of GPUs; its name contains the number if there are several."""
    return path if len(counts) == 1 else path.with_stem(f"{path.stem}_{num_gpus}gpus")


def main() -> None:
    """Prints the ranking for each number of GPUs and writes the best layout of each."""
    parser = ArgumentParser(DESCRIPTION, EXAMPLES, allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="path of the run's YAML file")
    parser.add_argument(
        "--gpus", required=True, metavar="N[,N...]", help="numbers of GPUs to plan for"
    )
    parser.add_argument(
        "--gpu", default=DEFAULT_GPU, help=f"{', '.join(GPUS)} (default: {DEFAULT_GPU})"
    )
    parser.add_argument(
        "--network-gbps",
        type=float,
        help="network bandwidth per GPU in Gbit/s (default: that of NVIDIA's reference systems)",
    )
    parser.add_argument(
        "--tokens", help="tokens to train on, such as 8B (default: the length of the run)"
    )
    parser.add_argument("--price", type=float, help="price of a GPU for one hour, for the cost")
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="METRICS",
        help="metrics.jsonl of a run on the same cluster, whose measured speed scales the "
        "predictions; its config.yaml must be beside it",
    )
    parser.add_argument(
        "--output", type=Path, metavar="YAML", help="file for the run with the best layout"
    )
    parser.add_argument(
        "--top", type=int, default=8, help="number of layouts to print (default: 8)"
    )
    arguments, flags = parser.parse_known_args()

    counts = parse_gpu_counts(arguments.gpus)
    gpu = find_gpu(arguments.gpu)
    for name in ("network_gbps", "price", "top"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')}: must be above 0, not {value}")
    network = None if arguments.network_gbps is None else arguments.network_gbps * 1e9 / 8
    config = load_config(arguments.config, flags)
    if not config.train.bf16:
        raise UserError("train.bf16: speeds are predicted for bf16 only; remove --no-bf16")
    offloading = offloading_of(config)
    if offloading is not None:
        raise UserError(
            f"{offloading}: speeds are predicted without offloading; remove it, "
            "and add it to the layout that you choose"
        )
    num_tokens = _num_tokens(arguments.tokens, config)
    for num_gpus in counts if arguments.output else ():
        check_output_file(output_path(arguments.output, num_gpus, counts))

    vocab_size, note = vocab_size_of(config)
    if note is not None:
        print(f"note: {note}", file=sys.stderr)
    speed, band = 1.0, UNTUNED_BAND
    if arguments.calibrate is not None:
        speed, measured = calibrate(arguments.calibrate, gpu, network)
        band = CALIBRATED_BAND
        print(
            f"calibrated by {arguments.calibrate}: {measured.name} on {measured.num_gpus} GPUs "
            f"reaches {speed:.2f} of the predicted speed\n"
        )
    train, num_planned = config.train, 0
    for num_gpus in counts:
        found = search_layouts(config, num_gpus, gpu, vocab_size, network=network, speed=speed)
        if not found:
            print(f"{num_gpus} x {arguments.gpu}: no valid layout fits\n")
            continue
        num_planned += 1
        print(
            f"{num_gpus} x {arguments.gpu}, {train.global_batch_size} samples of "
            f"{config.data.seq_length:,} tokens per step, {num_tokens:,} tokens: "
            f"{len(found):,} layouts fit in {MEMORY_SHARE * gpu.memory / 2**30:.0f} GiB\n"
            f"speeds are predicted, not measured: expect {band[0]:.2f} to {band[1]:.2f} of them\n"
        )
        try:
            validate_for_world(config, num_gpus)
        except UserError:  # the file's layout is not valid for this number of GPUs
            own = None
        else:
            own = plan_layout(config, num_gpus, gpu, vocab_size, network=network, speed=speed)
        costs = num_tokens, arguments.price
        print(report_layouts(found, own, costs, band, arguments.top))
        if arguments.output is not None:
            path = output_path(arguments.output, num_gpus, counts)
            write_output_file(path, best_yaml(found[0], arguments.gpu).encode())
            print(f"wrote {found[0].name} to {path}")
        print()
    if num_planned == 0:
        raise UserError(
            f"--gpus: no valid layout fits on {arguments.gpus} x {arguments.gpu}; use more GPUs, "
            "or a global batch that more of them divide"
        )


def _num_tokens(text: str | None, config: RunConfig) -> int:
    """Returns the number of tokens in ``--tokens``, or that of the run."""
    if text is None:
        return config.num_samples * config.data.seq_length
    try:
        number = int(text) if text.isdecimal() else parse_count(text)
    except UserError as error:
        raise UserError(f"--tokens: {error}") from None
    if number < 1:
        raise UserError(f"--tokens: must be above 0, not {text}")
    return number
