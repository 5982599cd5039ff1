"""Published training speeds, and the fit of the step-time model to them.

``python tests/unit/simulate/published.py`` fits the constants of `step_time.FittedConstants` to all
rows of megatron-core, prints them, and prints the errors on rows that were held out.
"""

import csv
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from megatron_chatflow.simulate.step_time import (
    GPUS,
    FittedConstants,
    GpuSpec,
    Stack,
    StepLayout,
    TransformerShape,
    predict_step,
)

PATH = Path(__file__).parents[2] / "data" / "published_throughput.csv"
MEGATRON = ("nemo", "bridge", "megatron")
"""Stacks that are megatron-core with NVIDIA's settings."""

SPECS = {
    "A100": GPUS["a100-80"],
    "H100": GPUS["h100"],
    # torchtitan's cluster: 96 GB of slower memory and a limit of 500 W.
    "H100-500W": replace(GPUS["h100"], hbm=2400e9, attention=0.45, clock=0.85),
    "H200": GPUS["h200"],
    "B200": GPUS["b200"],
    "GB200": GPUS["gb200"],
    "GB300": GPUS["gb300"],
}
SHARDINGS = {"ddp": "none", "zero1": "optimizer", "fsdp3": "weights"}

Errors = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """A published measurement.

    Attributes:
        values: The columns of the file.
        shape: The model.
        layout: The layout.
        gpu: The GPU.
        tokens_per_second: Published tokens per second and GPU.
    """

    values: dict[str, str]
    shape: TransformerShape
    layout: StepLayout
    gpu: GpuSpec
    tokens_per_second: float

    @property
    def is_fitted(self) -> bool:
        """Whether fits may use the row."""
        return self.values["use_in_fit"] == "1"

    @property
    def stack(self) -> str:
        """The software that was measured."""
        return self.values["stack"]

    @property
    def kind(self) -> tuple[str, str]:
        """GPU and precision."""
        return self.values["gpu"], self.values["precision"]

    @property
    def cluster(self) -> str:
        """Name that near copies share: model, GPU, precision and model-parallel layout."""
        names = "model layers gpu precision tp pp cp dp_kind recompute stack".split()
        return "|".join(self.values[name] for name in names)

    @property
    def mfu(self) -> float:
        """Model FLOP/s (PaLM's count) over the peak of the precision."""
        shape = self.shape
        parameters = shape.num_layers * shape.layer_parameters
        parameters += (1 if shape.is_tied else 2) * shape.table_parameters
        attention = 12 * shape.num_layers * shape.query_size * self.layout.seq_length
        peak = self.gpu.bf16 if self.kind[1] == "bf16" else self.gpu.fp8
        return self.tokens_per_second * (6 * parameters + attention) / peak

    def predict(self, constants: FittedConstants | None = None) -> float:
        """Returns the predicted tokens per second and GPU."""
        layout = self.layout
        seconds = predict_step(self.shape, layout, self.gpu, constants).seconds
        return layout.global_batch_size * layout.seq_length / seconds / layout.num_gpus


def _parse(values: dict[str, str]) -> Row | None:
    """Returns a row; None if the model of the step does not cover it."""

    def integer(name: str) -> int:
        return int(float(values[name] or 0))

    kind, _, number = values["recompute"].partition(":")
    if values["dp_kind"] not in SHARDINGS or values["zero_group"]:
        return None
    if kind == "selective-op" or number == "half":
        return None
    heads = integer("heads")
    head_dim = integer("hidden") // heads
    shape = TransformerShape(
        num_layers=integer("layers"),
        hidden_size=integer("hidden"),
        ffn_hidden_size=integer("ffn"),
        query_size=heads * head_dim,
        key_value_size=integer("kv_groups") * head_dim,
        head_dim=head_dim,
        vocab_size=integer("vocab"),
        is_gated=bool(integer("gated")),
        is_tied=bool(integer("tied")),
    )
    recomputed = 0.0
    if kind == "full":
        recomputed = int(number) / shape.num_layers if number else 1.0
    layout = StepLayout(
        num_gpus=integer("n_gpus"),
        tensor=integer("tp"),
        pipeline=integer("pp"),
        chunks=integer("vp"),
        context=integer("cp"),
        seq_length=integer("seq"),
        micro_batch_size=integer("mbs"),
        global_batch_size=integer("gbs"),
        sequence_parallel=bool(integer("sp")),
        recomputes_attention=kind == "selective",
        recomputed_layers=recomputed,
        sharding=cast(Any, SHARDINGS[values["dp_kind"]]),
        overlaps_grad_reduce=bool(integer("dp_overlap")),
        overlaps_param_gather=bool(integer("dp_overlap")),
        domain=integer("nvlink_domain"),
        network=1e9 * float(values["net_GBps_per_gpu"]),
        stack=Stack(
            precision=cast(Any, values["precision"]),
            # NeMo's recipes and InternEvo reduce in bf16.
            gradient_bytes=2 if values["stack"] in ("nemo", "bridge", "evo") else 4,
            overlaps_tensor_exchange=bool(integer("tp_overlap")),
            rotates_keys=True,
            attention=cast(Any, values["attention"]),
            fuses_elementwise=values["stack"] not in ("fsdp", "nano"),
        ),
    )
    return Row(values, shape, layout, SPECS[values["gpu"]], float(values["tok_s_gpu"]))


def read_rows() -> list[Row]:
    """Returns the rows that the model of the step covers."""
    with PATH.open(newline="", encoding="utf-8") as file:
        rows = [_parse(values) for values in csv.DictReader(file)]
    return [row for row in rows if row is not None]


def megatron_rows() -> list[Row]:
    """Returns the rows of megatron-core that fits may use."""
    return [row for row in read_rows() if row.is_fitted and row.stack in MEGATRON]


def log_errors(rows: Iterable[Row], constants: FittedConstants | None = None) -> Errors:
    """Returns log(predicted / published) of each row, float64[n]."""
    return np.array([math.log(row.predict(constants) / row.tokens_per_second) for row in rows])


def relative(errors: Errors) -> Errors:
    """Returns |predicted / published - 1| of log errors, float64[n]."""
    return np.abs(np.expm1(errors))


def split_by_cluster(rows: Sequence[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """Splits rows into two halves, with all rows of a cluster in the same one."""
    clusters = sorted({row.cluster for row in rows})
    np.random.default_rng(seed).shuffle(clusters)
    chosen = set(clusters[: len(clusters) // 2])
    return [r for r in rows if r.cluster in chosen], [r for r in rows if r.cluster not in chosen]


BOUNDS = FittedConstants(0.5, 0.45, 0.4, 0.4, 0.0, 0.0), FittedConstants(0.95, 0.95, 0.95, 1, 1, 1)
START = FittedConstants(0.75, 0.65, 0.60, 0.80, 0.40, 0.20)


def fit_loss(rows: Sequence[Row], constants: FittedConstants) -> float:
    """Returns the mean absolute log error, in which every group of rows has the same weight."""
    groups = Counter(row.values["group"] for row in rows)
    weights = np.array([1 / groups[row.values["group"]] for row in rows])
    return float(np.average(np.abs(log_errors(rows, constants)), weights=weights))


def fit(rows: Sequence[Row]) -> FittedConstants:
    """Fits the constants by the pattern search of Hooke and Jeeves (1961), minimizing `fit_loss`.

    Each constant in turn is moved up and down. If that improves the fit, the sum of the moves is
    repeated; if not, the step is halved.
    """
    low, high = (np.array(astuple(bound)) for bound in BOUNDS)

    def loss(values: Errors) -> float:
        return fit_loss(rows, FittedConstants(*values.tolist()))

    def explore(values: Errors, lowest: float) -> tuple[Errors, float]:
        for index in range(len(values)):
            for change in (step, -step):
                moved = values.copy()
                moved[index] = np.clip(moved[index] + change, low[index], high[index])
                if (found := loss(moved)) < lowest - 1e-7:
                    values, lowest = moved, found
                    break
        return values, lowest

    best, step = np.array(astuple(START)), 0.08
    lowest = loss(best)
    while step > 1e-3:
        moved, found = explore(best, lowest)
        if found == lowest:
            step /= 2
            continue
        while found < lowest:
            repeated = np.clip(2 * moved - best, low, high)
            best, lowest = moved, found
            moved, found = explore(repeated, loss(repeated))
    return FittedConstants(*np.round(best, 3).tolist())


def constant_mfu_errors(train: Sequence[Row], test: Sequence[Row]) -> Errors:
    """Returns the log errors of the baseline, float64[n].

    It predicts the median MFU of the training rows with the same GPU and precision, or with the
    same precision if there are none.
    """

    def predict(row: Row) -> float:
        same = [other.mfu for other in train if other.kind == row.kind]
        is_bf16 = row.kind[1] == "bf16"
        similar = [other.mfu for other in train if (other.kind[1] == "bf16") == is_bf16]
        return float(np.median(same or similar))

    return np.array([math.log(predict(row) / row.mfu) for row in test])


def summarize(errors: Errors) -> str:
    """Formats the median and the 90th percentile of the relative errors."""
    error = 100 * relative(errors)
    return f"median {np.median(error):5.1f} %  p90 {np.percentile(error, 90):5.1f} %"


def main() -> None:
    """Fits the constants and prints the errors on held-out rows."""
    rows = megatron_rows()
    constants = fit(rows)
    print(f"fitted to {len(rows)} rows: {constants}")
    for seed in range(5):
        train, test = split_by_cluster(rows, seed)
        errors = log_errors(test, fit(train))
        baseline = constant_mfu_errors(train, test)
        print(f"\nseed {seed}: fitted to {len(train)} rows, {len(test)} held out")
        print(f"  all           {summarize(errors)}   constant MFU {summarize(baseline)}")
        for kind in sorted({row.kind for row in test}):
            mine = [index for index, row in enumerate(test) if row.kind == kind]
            shown = f"{summarize(errors[mine])}   constant MFU {summarize(baseline[mine])}"
            print(f"  {kind[0]:6}{kind[1]:6}{len(mine):4d} {shown}")
    others = [row for row in read_rows() if row not in rows]
    print("\nrows that were never fitted, published / predicted:")
    for key in sorted({(row.stack, *row.kind) for row in others}):
        mine = [row for row in others if (row.stack, *row.kind) == key]
        low, middle, high = np.exp(-np.percentile(log_errors(mine, constants), [95, 50, 5]))
        print(
            f"  {key[0]:9}{key[1]:10}{key[2]:6}{len(mine):4d}  {low:.2f}  {middle:.2f}  {high:.2f}"
        )


if __name__ == "__main__":
    main()
