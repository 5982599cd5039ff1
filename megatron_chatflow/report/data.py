"""Reads the logs of a run and prepares them for the report's charts and tables.

The folder of a run contains `metrics.jsonl`, `restarts.jsonl`, `status.json` and `config.yaml`. The
run may be finished or still in progress. Incomplete, damaged or unknown lines are counted and
skipped. `RunReader.read` parses only lines that were appended since its last call, and numbers are
stored as columns of float64, so that the report can follow a run of a million logged iterations.

Long curves are reduced before they are drawn: `condense` limits the number of points, and `smooth`
removes noise.
"""

import json
import math
import warnings
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import orjson

from megatron_chatflow.config.yaml_file import parse_yaml
from megatron_chatflow.errors import UserError

FloatArray = npt.NDArray[np.float64]
BySource = Mapping[str, Mapping[str, FloatArray]]

PLANNED_CAUSES = {
    "finished": "extended after its last iteration",
    "exit_interval": "exit interval",
    "stop_requested": "stop requested",
    "another_folder": "continued from another folder",
}
"""Causes of restarts that are not failures, with their descriptions in the report."""
RUN_FIELDS = (
    "interval",
    "consumed_samples",
    "global_batch_size",
    "consumed_tokens",
    "lm_loss",
    "learning_rate",
    "weight_decay",
    "grad_norm",
    "params_norm",
    "tokens_per_second",
    "tflops_per_gpu",
    "mfu",
    "mfu_causal",
    "memory_bytes",
    "time",
    "seconds",
    "data_seconds",
    "num_restarts",
    "seconds_lost",
    "num_skipped",
    "skipped_no_loss_tokens",
    "num_rollbacks",
    "stage",
)
SOURCE_FIELDS = (
    *("loss", "weight", "realised", "tokens", "loss_tokens", "epochs"),
    "objective_weight",
)
VALIDATION_FIELDS = ("loss", "bits_per_byte")
LAYER_FIELDS = ("params", "grads")
PROBE_FIELDS = ("value", "stderr")
PROBE_SEPARATOR = ": "
MAX_POINTS = 360
"""Maximum number of points per curve."""
MAX_CHANGES = 20
"""Maximum number of changes that are shown per restart."""
MAX_SOURCES = 1024
"""Maximum number of sources that are read; further sources are ignored. It limits the memory for
files that are not metrics."""
MAX_MAGNITUDE = 1e100
"""Numbers of a larger magnitude are read as NaN. They are not measurements and would overflow in a
chart."""


@dataclass(frozen=True)
class Restart:
    """A point at which a run was resumed."""

    iteration: int  # iteration of the checkpoint from which the run was resumed
    # Number of this start of the run; the first restart is attempt 2. 0 if unknown.
    attempt: int = 0
    seconds_lost: float = math.nan  # wall time lost by the restart, in seconds; NaN if unknown
    reached: int = 0  # the last iteration logged before the restart, at least ``iteration``
    # The reason for which the run had ended, one of
    # `megatron_chatflow.training.callbacks.restarts.Cause`.
    cause: str = "unknown"
    changes: tuple[str, ...] = ()  # changes of the schedule and its sources

    @property
    def is_planned(self) -> bool:
        """Whether the run had ended on request."""
        return self.cause in PLANNED_CAUSES


class Records:
    """Rows of numbers, stored as columns. Rows can be appended and removed at the end.

    Each row has an ``iteration`` (ascending), numbers of its own, and an object with numbers by
    source under the key ``block``. ``columns`` are by ``(field,)`` or ``(source, field)``, with NaN
    where a row has no value.
    """

    def __init__(self, fields: Sequence[str], block: str, block_fields: Sequence[str]) -> None:
        self._fields, self._block, self._block_fields = fields, block, block_fields
        self.iteration = array("d")
        self.columns: dict[tuple[str, ...], array[float]] = {}
        self._sources: dict[str, None] = {}

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a row."""
        num_rows = len(self.iteration)
        for key, value in self._items(record):
            if type(value) is float or type(value) is int:
                column = self.columns.get(key)
                if column is None:
                    column = self.columns[key] = array("d", [math.nan]) * num_rows
                column.append(_to_float(value))
        self.iteration.append(record["iteration"])
        for column in self.columns.values():
            if len(column) == num_rows:
                column.append(math.nan)

    def _items(self, record: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
        for field in self._fields:
            yield (field,), record.get(field)
        blocks = record.get(self._block)
        for source, block in blocks.items() if isinstance(blocks, dict) else ():
            is_known = source in self._sources or len(self._sources) < MAX_SOURCES
            if is_known and isinstance(block, dict):
                self._sources[source] = None
                for field in self._block_fields:
                    yield (source, field), block.get(field)

    def cut(self, iteration: int) -> bool:
        """Removes the rows from ``iteration`` on and returns whether there were any."""
        num_rows = len(self.iteration)
        while num_rows and self.iteration[num_rows - 1] >= iteration:
            num_rows -= 1
        if num_rows == len(self.iteration):
            return False
        for column in (self.iteration, *self.columns.values()):
            del column[num_rows:]
        return True

    def column(self, *key: str) -> FloatArray:
        """Returns a copy of one column, float64[num_rows]; all NaN if the column is missing."""
        column = self.columns.get(key) or [math.nan] * len(self.iteration)
        return np.array(column, dtype=np.float64)

    def by_source(self) -> dict[str, dict[str, FloatArray]]:
        """Returns copies of the columns of every source, in the order of first appearance."""
        return {
            source: {field: self.column(source, field) for field in self._block_fields}
            for source in self._sources
        }


class MetricsReader:
    """Reads a `metrics.jsonl` that may grow, be truncated or be replaced between reads.

    ``training`` has a row per logged iteration, ``layers`` one per iteration with norms of layers,
    ``validation`` one per validation, and ``probes`` one per evaluation of probes. The sources of
    the latter are a probe's label and the name of a number, joined by `PROBE_SEPARATOR`.
    ``decisions`` are those of a controller by the number of their horizon. ``repeats`` holds the
    last iteration logged before each resume, by the iteration that was resumed from.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reset()

    def _reset(self) -> None:
        self.training = Records(RUN_FIELDS, "sources", SOURCE_FIELDS)
        self.layers = Records((), "layer_norms", LAYER_FIELDS)
        self.validation = Records((), "validation", VALIDATION_FIELDS)
        self.probes = Records((), "probes", PROBE_FIELDS)
        self.decisions: dict[int, Decision] = {}
        self.repeats: dict[int, int] = {}
        self._num_unreadable = 0
        self._is_torn = False
        self._offset = self._inode = 0

    @property
    def num_unreadable(self) -> int:
        """Number of lines that are not records, including an incomplete last line."""
        return self._num_unreadable + self._is_torn

    def read_new_lines(self) -> None:
        """Parses appended lines, or the whole file if it was replaced or became shorter."""
        with open(self.path, "rb") as file:
            size, inode = file.seek(0, 2), self.path.stat().st_ino
            if size < self._offset or inode != self._inode:
                self._reset()
                self._inode = inode
            file.seek(self._offset)
            self._is_torn = False
            for line in file:
                # A last line without a newline may be incomplete unless it is a whole object.
                if not line.endswith(b"\n") and parse_object(line) is None:
                    self._is_torn = True
                    return
                self._offset += len(line)
                if line.strip():
                    self._add(parse_object(line) or {})

    def _add(self, record: dict[str, Any]) -> None:
        iteration = record.get("iteration")
        if type(iteration) is not int or not 0 <= iteration < 2**53:
            self._num_unreadable += 1
        elif "validation" in record:
            self.validation.cut(iteration)
            self.validation.append(record)
        elif "probes" in record:
            found = _probe_numbers(record["probes"])
            self.probes.cut(iteration)
            if found:
                self.probes.append({"iteration": iteration, "probes": found})
        elif "decision" in record:
            decision = _parse_decision(record["decision"])
            if decision is not None:
                self.decisions[decision.horizon] = decision
        elif "choice" not in record and "upload" not in record:
            reached = int(self.training.iteration[-1]) if self.training.iteration else 0
            if self.training.cut(iteration):
                # The run was resumed before this iteration, so later records are invalid.
                self.repeats = {at: to for at, to in self.repeats.items() if at < iteration - 1}
                self.repeats[iteration - 1] = reached
                self.validation.cut(iteration)
                self.probes.cut(iteration)
                self.layers.cut(iteration)
            self.training.append(record)
            if isinstance(record.get("layer_norms"), dict):
                self.layers.append(record)


def _probe_numbers(results: Any) -> dict[str, dict[str, Any]]:
    """Returns the value and the standard error of each number of each probe."""
    found: dict[str, dict[str, Any]] = {}
    for label, result in results.items() if isinstance(results, dict) else ():
        for name, value in result.items() if isinstance(result, dict) else ():
            if not name.startswith("num_") and not name.endswith("_stderr"):
                numbers = {"value": value, "stderr": result.get(f"{name}_stderr")}
                found[f"{label}{PROBE_SEPARATOR}{name}"] = numbers
    return found


def parse_object(line: bytes) -> dict[str, Any] | None:
    """Parses a JSON object; returns None for anything else."""
    try:
        record = orjson.loads(line)
    except ValueError:
        try:
            record = json.loads(line)  # accepts NaN as well
            # It also accepts escapes of lone surrogates, which no page can contain.
            json.dumps(record, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            return None
    return record if isinstance(record, dict) else None


def _to_float(value: Any) -> float:
    """Converts a value to float; returns NaN for other types and above `MAX_MAGNITUDE`."""
    is_number = isinstance(value, int | float)
    return float(value) if is_number and -MAX_MAGNITUDE < value < MAX_MAGNITUDE else math.nan


def _read_if_present(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _parse_restart(record: Mapping[str, Any]) -> Restart | None:
    counts = [record.get(key) for key in ("iteration", "attempt", "reached")]
    if not all(type(value) is int and 0 <= value < 2**53 for value in counts):
        return None
    cause, changes = record.get("cause"), record.get("changes")
    changes = [text for text in changes if isinstance(text, str)] if type(changes) is list else []
    return Restart(
        iteration=record["iteration"],
        attempt=record["attempt"],
        seconds_lost=_to_float(record.get("seconds_lost")),
        reached=record["reached"],
        cause=cause if cause == "failed" or cause in list(PLANNED_CAUSES) else "unknown",
        changes=tuple(changes[:MAX_CHANGES]),
    )


@dataclass(frozen=True)
class Decision:
    """Weights that a controller decided for a horizon."""

    horizon: int  # number of the horizon, from 0
    begin: int  # first sample of the horizon
    end: int  # the sample after the last
    weights: Mapping[str, float]  # shares by source


def _parse_decision(record: Any) -> Decision | None:
    if not isinstance(record, dict) or not isinstance(record.get("weights"), dict):
        return None
    horizon, begin, end = (record.get(key) for key in ("horizon", "begin", "end"))
    if not all(type(value) is int and 0 <= value < 2**53 for value in (horizon, begin, end)):
        return None
    given = list(record["weights"].items())[:MAX_SOURCES]
    weights = {name: _to_float(weight) / 2**32 for name, weight in given}
    return Decision(record["horizon"], record["begin"], record["end"], weights)


@dataclass(frozen=True)
class RunMetrics:
    """The logged metrics of one run."""

    name: str  # name of the run's folder
    folder: Path
    iteration: FloatArray  # float64[n], the logged iterations, ascending
    columns: Mapping[str, FloatArray]  # float64[n] for each of `RUN_FIELDS`; NaN for missing values
    # float64[n] for each source and each of `SOURCE_FIELDS`. Sources are in the order of first
    # appearance.
    sources: BySource
    validation_iteration: FloatArray  # float64[m], the iterations with a validation, ascending
    validation: BySource  # float64[m] for each source and each of `VALIDATION_FIELDS`
    probe_iteration: FloatArray  # float64[p], the iterations with probes, ascending
    # float64[p] for each number of each probe, as `MetricsReader` names them, and each of
    # `PROBE_FIELDS`
    probes: BySource
    layer_iteration: FloatArray  # float64[k], the iterations with norms of layers, ascending
    layers: BySource  # float64[k] for each layer and each of `LAYER_FIELDS`
    decisions: tuple[Decision, ...]  # decisions of a controller, by horizon
    restarts: tuple[Restart, ...]  # restarts in chronological order
    status: str  # one of `megatron_chatflow.training.callbacks.restarts.Status`; "" if unknown
    num_unreadable_lines: int  # number of lines that were skipped because they are not records
    config: Mapping[str, Any]  # the resolved configuration; {} if there is no `config.yaml`
    config_text: str  # text of `config.yaml`; "" if it is missing

    def setting(self, section: str, key: str) -> Any:
        """Returns one value of the configuration; None if it is not set."""
        block = self.config.get(section)
        return block.get(key) if isinstance(block, dict) else None

    def train_count(self, key: str) -> int | None:
        """Returns a positive integer from the section ``train``; None if it is not set."""
        value = self.setting("train", key)
        return value if type(value) is int and 0 < value < 2**63 else None

    @property
    def last_iteration(self) -> int:
        """The last logged iteration, or the last validated one if no iteration was logged."""
        return int((self.iteration if len(self.iteration) else self.validation_iteration)[-1])

    @property
    def progress(self) -> float | None:
        """Finished fraction of the run in [0, 1]; None if the configuration sets no length."""
        batch = last_value(self.columns["global_batch_size"])
        if not np.isfinite(batch):  # written by version 0.1
            batch = self.train_count("global_batch_size") or 1
        samples = last_value(self.columns["consumed_samples"])
        for key, done, step in (
            ("train_iters", last_value(self.iteration), 1),
            ("train_samples", samples, batch),
        ):
            goal = self.train_count(key)
            if goal is not None and np.isfinite(done):
                # Remaining samples that do not fill a global batch are not trained.
                return 1.0 if goal - done < step else done / goal
        return None


class RunReader:
    """Reads a run's folder repeatedly, parsing each line of its metrics once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._metrics = MetricsReader(folder / "metrics.jsonl")

    def read(self) -> RunMetrics:
        """Returns everything logged so far.

        Raises:
            UserError: The folder or its metrics are missing or unreadable, no iteration was logged
                yet, or the configuration is damaged.
        """
        folder, metrics = self._folder, self._metrics
        if not folder.is_dir():
            raise UserError(f"{folder}: folder not found; give the --save folder of a run")
        if not metrics.path.is_file():
            raise UserError(f"{folder}: has no metrics.jsonl; give the --save folder of a run")
        try:
            metrics.read_new_lines()
            lines = _read_if_present(folder / "restarts.jsonl").splitlines()
            status = parse_object(_read_if_present(folder / "status.json")) or {}
        except OSError as error:
            raise UserError(f"{metrics.path}: cannot be read ({error.strerror})") from None
        training, validation = metrics.training, metrics.validation
        if not len(training.iteration) and not len(validation.iteration):
            raise UserError(
                f"{metrics.path}: contains no logged iteration yet; wait for the first log interval"
            )
        parsed = [_parse_restart(parse_object(line) or {}) for line in lines if line.strip()]
        recorded = tuple(restart for restart in parsed if restart is not None)
        repeats = sorted(metrics.repeats.items())
        config, config_text = _read_config(folder / "config.yaml")
        iteration = np.array(training.iteration, dtype=np.float64)
        columns = {field: training.column(field) for field in RUN_FIELDS}
        return RunMetrics(
            name=folder.resolve().name,
            folder=folder,
            iteration=iteration,
            columns=columns,
            sources=training.by_source(),
            validation_iteration=np.array(validation.iteration, dtype=np.float64),
            validation=validation.by_source(),
            probe_iteration=np.array(metrics.probes.iteration, dtype=np.float64),
            probes=metrics.probes.by_source(),
            layer_iteration=np.array(metrics.layers.iteration, dtype=np.float64),
            layers=metrics.layers.by_source(),
            decisions=tuple(one for _, one in sorted(metrics.decisions.items())),
            restarts=recorded
            or _counted_restarts(iteration, columns)
            or tuple(Restart(iteration=before, reached=reached) for before, reached in repeats),
            status=status["status"] if isinstance(status.get("status"), str) else "",
            num_unreadable_lines=metrics.num_unreadable + len(parsed) - len(recorded),
            config=config,
            config_text=config_text,
        )


def read_run(folder: Path) -> RunMetrics:
    """Reads a run's folder once; see `RunReader.read`."""
    return RunReader(folder).read()


def _counted_restarts(
    iteration: FloatArray, columns: Mapping[str, FloatArray]
) -> tuple[Restart, ...]:
    """Returns the restarts of a run without `restarts.jsonl`, from the counters in its metrics."""
    count, lost = (np.nan_to_num(columns[key]) for key in ("num_restarts", "seconds_lost"))
    return tuple(
        Restart(
            iteration=int(iteration[row - 1]) if row else 0,
            attempt=int(count[row]) + 1,
            seconds_lost=float(lost[row] - (lost[row - 1] if row else 0.0)),
        )
        for row in np.flatnonzero(np.diff(count, prepend=0.0) > 0).tolist()
    )


def _read_config(path: Path) -> tuple[dict[str, Any], str]:
    """Returns the configuration and its text; both are empty if the file is missing."""
    try:
        text = path.read_text(encoding="utf-8")
        return parse_yaml(text, str(path)), text
    except FileNotFoundError:
        return {}, ""
    except (UserError, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: is not valid YAML ({error}); restore the file or move it away"
        ) from None


def last_value(values: FloatArray) -> float:
    """Returns the last finite value; NaN if there is none."""
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else math.nan


def median(values: FloatArray) -> float:
    """Returns the median of the finite values; NaN if there is none."""
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else math.nan


def condense(
    x: FloatArray,
    y: FloatArray,
    how: Literal["mean", "last", "extreme"] = "mean",
    max_points: int = MAX_POINTS,
) -> tuple[FloatArray, FloatArray]:
    """Reduces a curve to at most ``max_points`` points, one per group of consecutive points.

    The value of a group is its mean, its last value, or its value of largest magnitude
    (``extreme``); mean and extreme ignore NaN.

    Returns:
        The last x and the reduced y of each group, float64[min(n, max_points)].
    """
    if len(x) <= max_points:
        return x, y
    edges = np.linspace(0, len(x), max_points + 1).astype(np.int64)
    last = edges[1:] - 1
    if how == "last":
        return x[last], y[last]
    groups = np.split(y, edges[1:-1])
    if how == "extreme":
        picked = [group[np.argmax(np.nan_to_num(np.abs(group), nan=-1.0))] for group in groups]
        return x[last], np.array(picked)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=RuntimeWarning)  # groups with only NaN
        return x[last], np.array([np.nanmean(group) for group in groups])


def smooth(y: FloatArray, window: int) -> FloatArray:
    """Computes the centred moving mean of the finite values, over an odd number of points.

    The window is shorter at the ends. A mean of no finite value is NaN.
    """
    if window <= 1 or not len(y):
        return y
    known = np.isfinite(y)
    ones = np.ones(min(window, 2 * len(y) - 1))
    begin = len(ones) // 2
    total = np.convolve(np.where(known, y, 0.0), ones)[begin : begin + len(y)]
    count = np.convolve(known.astype(np.float64), ones)[begin : begin + len(y)]
    return np.where(count > 0.5, total / np.maximum(count, 1.0), np.nan)


def smoothing_window(num_points: int) -> int:
    """Returns the window for `smooth`: 1 below 40 points, about a thirtieth of the points above."""
    return 1 if num_points < 40 else 2 * (num_points // 60) + 1


TOKENS, SAMPLES, ITERATION = "Tokens consumed", "Samples consumed", "Iteration"


@dataclass(frozen=True)
class XAxis:
    """The horizontal axis of a run's curves."""

    label: str  # `TOKENS`, `SAMPLES`, or `ITERATION` if the log has no such count
    x: FloatArray  # float64[n], ascending, the position of each logged iteration
    iteration: FloatArray  # float64[n], the logged iterations

    @classmethod
    def of(cls, run: RunMetrics, label: str = TOKENS) -> "XAxis":
        """Creates the axis of a run.

        Missing counts are interpolated. Decreasing counts are replaced by the largest one so far.
        """
        count = run.columns["consumed_samples" if label == SAMPLES else "consumed_tokens"]
        known = np.isfinite(count)
        if label == ITERATION or not known.any():
            return cls(ITERATION, run.iteration, run.iteration)
        x = np.interp(run.iteration, run.iteration[known], count[known])
        return cls(label, np.maximum.accumulate(x), run.iteration)

    def at(self, iterations: FloatArray) -> FloatArray:
        """Returns the positions of iterations, float64[m].

        Positions after the last logged iteration are extrapolated at the mean rate.
        """
        if not len(self.x) or self.label == ITERATION:
            return iterations
        last = float(self.iteration[-1])
        rate = self.x[-1] / max(last, 1.0)
        inside = np.interp(iterations, [0.0, *self.iteration], [0.0, *self.x])
        return np.asarray(inside + rate * np.maximum(iterations - last, 0.0), dtype=np.float64)


def samples_per_record(run: RunMetrics) -> FloatArray:
    """Returns the samples consumed since the previous logged iteration, float64[n]."""
    consumed = run.columns["consumed_samples"]
    if not len(consumed):
        return consumed
    steps = np.diff(consumed, prepend=0.0)
    covered = float(np.nan_to_num(run.columns["interval"][0], nan=1.0))
    if run.iteration[0] != covered and len(consumed) > 1:
        steps[0] = steps[1]  # the log begins later than the run
    return np.asarray(steps, dtype=np.float64)


def realised_shares(run: RunMetrics) -> dict[str, FloatArray]:
    """Returns the share of each source since the previous logged iteration, float64[n] by source.

    The field ``realised`` describes only the logged iteration. The cumulative token counts include
    the iterations between two logs, and are used if they are known.
    """
    total = np.diff(run.columns["consumed_tokens"], prepend=0.0)
    shares = {}
    for name, block in run.sources.items():
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.diff(np.nan_to_num(block["tokens"]), prepend=0.0) / total
        is_counted = np.isfinite(share) & np.isfinite(block["tokens"])
        shares[name] = np.where(is_counted, share, block["realised"])
    return shares


def deviation_from_plan(run: RunMetrics) -> dict[str, FloatArray]:
    """Returns the cumulative drawn minus planned samples of each source at each logged iteration.

    Returns:
        float64[n] by source; {} if the log does not cover every iteration from the first on.
    """
    interval = run.columns["interval"]
    covered = np.cumsum(np.where(np.isfinite(interval), interval, 1.0))
    if not len(covered) or not np.array_equal(run.iteration, covered):
        return {}
    drawn, shares = samples_per_record(run), realised_shares(run)
    return {
        name: np.cumsum((np.nan_to_num(shares[name]) - np.nan_to_num(block["weight"])) * drawn)
        for name, block in run.sources.items()
    }
