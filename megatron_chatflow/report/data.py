"""Reads what a run left behind into arrays that the report draws.

A run's folder has `metrics.jsonl`, `restarts.jsonl`, `status.json` and `config.yaml`, whether it is
finished or still running. A `RunMetrics` has one entry per logged iteration and one per validation,
in order, without repetitions. Reading again reads what is new, so that a page can follow a run of a
million lines.

The lines of a run's records, as columns of numbers that grow and are cut.

In: ``metrics.jsonl`` and ``restarts.jsonl``, being written, torn by a kill, or from elsewhere. Out:
`Records`, which need eight bytes a number, and `Restart`s. What cannot be read is counted.

Makes long curves drawable: fewer points, less noise, the blend's deviation from its plan.

In: float64 arrays with NaN for gaps. Out: arrays of a few hundred points.
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

LARGEST_NUMBER = 1e100
"""What lies beyond is no measurement, and would overflow where it is drawn."""
PLANNED = {
    "finished": "extended after its end",
    "exit_interval": "exit interval",
    "stop_requested": "asked to stop",
    "another_folder": "continued from another folder",
}
"""Causes of a restart that are no failure, and what the page calls them."""
MAX_CHANGES = 20
"""Changes of one restart that are shown."""
MAX_SOURCES = 1024
"""A blend has 512 at most; a file from elsewhere shall not fill the memory."""
RUN_FIELDS = (
    "interval",
    "consumed_samples",
    "consumed_tokens",
    "lm_loss",
    "learning_rate",
    "grad_norm",
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
)
SOURCE_FIELDS = ("loss", "weight", "realised", "tokens", "loss_tokens", "epochs")
VALIDATION_FIELDS = ("loss", "bits_per_byte")


@dataclass(frozen=True)
class Restart:
    """One time that a run was taken up again.

    Attributes:
        iteration: The last iteration that counts: that of the checkpoint it went on from.
        attempt: Which start of the run this was; the first restart is the second. 0 if unknown.
        seconds_lost: Wall time that it cost; NaN if unknown.
        reached: The last iteration that had been logged before; the same as ``iteration`` or later.
        cause: Why the run had ended, as `train.restarts.Cause` names it; "unknown" if unknown.
        changes: What the resume changed in the schedule and its sources.
    """

    iteration: int
    attempt: int = 0
    seconds_lost: float = math.nan
    reached: int = 0
    cause: str = "unknown"
    changes: tuple[str, ...] = ()

    @property
    def is_planned(self) -> bool:
        """Whether the run had ended because it was asked to."""
        return self.cause in PLANNED


class Records:
    """Rows of numbers by column; a number that a row lacks is NaN.

    Attributes:
        iteration: Of each row, ascending.
        columns: By field.
        blocks: By source, then by field.
    """

    def __init__(self, fields: Sequence[str], block: str, block_fields: Sequence[str]) -> None:
        """Takes the fields to keep, the one that holds numbers by source, and the fields there."""
        self._fields = fields
        self._block, self._block_fields = block, block_fields
        self.iteration = array("d")
        self.columns: dict[str, array[float]] = {}
        self.blocks: dict[str, dict[str, array[float]]] = {}

    def append(self, record: dict[str, Any]) -> None:
        """Adds a row."""
        length = len(self.iteration)
        self._fill(self.columns, self._fields, record, length)
        sources = record.get(self._block)
        for name, values in sources.items() if isinstance(sources, dict) else ():
            if isinstance(values, dict) and (name in self.blocks or len(self.blocks) < MAX_SOURCES):
                columns = self.blocks.setdefault(name, {})
                self._fill(columns, self._block_fields, values, length)
        self.iteration.append(record["iteration"])
        for column in self._all():
            if len(column) <= length:
                column.append(math.nan)

    def cut(self, iteration: int) -> bool:
        """Removes the rows from ``iteration`` on; true if there were any."""
        length = len(self.iteration)
        while length and self.iteration[length - 1] >= iteration:
            length -= 1
        if length == len(self.iteration):
            return False
        del self.iteration[length:]
        for column in self._all():
            del column[length:]
        return True

    def _all(self) -> Iterator["array[float]"]:
        yield from self.columns.values()
        for columns in self.blocks.values():
            yield from columns.values()

    @staticmethod
    def _fill(
        columns: "dict[str, array[float]]",
        fields: Sequence[str],
        values: dict[str, Any],
        length: int,
    ) -> None:
        for field in fields:
            value = values.get(field)
            if type(value) is float or type(value) is int:
                column = columns.get(field)
                if column is None:
                    column = columns[field] = array("d", [math.nan]) * length
                column.append(_number(value))


class LineReader:
    """The records of a file that grows, is cut, or is replaced while it is read.

    Attributes:
        path: The file.
        training: One row a logged iteration.
        validation: One row a validation.
    """

    def __init__(self, path: Path) -> None:
        """Takes the file; `read_on` opens it."""
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self.training = Records(RUN_FIELDS, "sources", SOURCE_FIELDS)
        self.validation = Records((), "validation", VALIDATION_FIELDS)
        self._num_unreadable = 0
        self._is_torn = False
        self._offset: int = 0
        self._file_number: int = 0
        self._repeats: dict[int, int] = {}

    def read_on(self) -> None:
        """Reads what was added; everything, if the file is another one or has become shorter.

        Raises:
            OSError: It cannot be read.
        """
        with open(self.path, "rb") as file:
            size, number = file.seek(0, 2), self.path.stat().st_ino
            if size < self._offset or number != self._file_number:
                self._forget()
                self._file_number = number
            file.seek(self._offset)
            self._is_torn = False
            for line in file:
                # A line without an end that is an object is whole; another may be being written.
                if not line.endswith(b"\n") and parse_object(line) is None:
                    self._is_torn = True
                    return
                self._offset += len(line)
                self._take(line)

    @property
    def num_unreadable(self) -> int:
        """Lines that were no record."""
        return self._num_unreadable + self._is_torn

    def repeats(self) -> tuple[Restart, ...]:
        """Restarts that show themselves in iterations which were logged twice."""
        return tuple(
            Restart(iteration=before, reached=reached)
            for before, reached in sorted(self._repeats.items())
        )

    def _take(self, line: bytes) -> None:
        if not line.strip():
            return
        record = parse_object(line)
        iteration = None if record is None else record.get("iteration")
        if record is None or type(iteration) is not int or not 0 <= iteration < 2**53:
            self._num_unreadable += 1
        elif "validation" in record:
            self.validation.cut(iteration)
            self.validation.append(record)
        elif "choice" not in record:
            self._take_training(record, iteration)

    def _take_training(self, record: dict[str, Any], iteration: int) -> None:
        """A record of iteration i after one of a later iteration: the run was resumed before i.

        What was logged from i on belongs to a future that was given up.
        """
        reached = int(self.training.iteration[-1]) if self.training.iteration else 0
        if self.training.cut(iteration):
            self._repeats = {at: to for at, to in self._repeats.items() if at < iteration - 1}
            self._repeats[iteration - 1] = reached
            self.validation.cut(iteration)
        self.training.append(record)


def parse_object(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None if it is none."""
    try:
        record = orjson.loads(line)
    except ValueError:
        try:
            record = json.loads(line)  # knows NaN as well
        except (ValueError, RecursionError):  # malformed, or bytes that are not UTF-8
            return None
    return record if isinstance(record, dict) else None


def read_restarts(path: Path) -> tuple[tuple[Restart, ...], int]:
    """The restarts that a run recorded, and how many lines were not one.

    Raises:
        OSError: The file is there and cannot be read.
    """
    restarts = []
    num_unreadable = 0
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return (), 0
    for line in raw.splitlines():
        record = parse_object(line) or {}
        whole = [record.get(key) for key in ("iteration", "attempt", "reached")]
        counts = [value for value in whole if type(value) is int and 0 <= value < 2**53]
        if len(counts) == len(whole):
            lost = record.get("seconds_lost")
            seconds = _number(lost) if isinstance(lost, int | float) else math.nan
            cause = record.get("cause")
            changes = record.get("changes")
            texts = (
                [one for one in changes if isinstance(one, str)]
                if isinstance(changes, list)
                else []
            )
            restarts.append(
                Restart(
                    iteration=counts[0],
                    attempt=counts[1],
                    seconds_lost=seconds,
                    reached=counts[2],
                    cause=cause if cause in ("failed", *PLANNED) else "unknown",
                    changes=tuple(texts[:MAX_CHANGES]),
                )
            )
        elif line.strip():
            num_unreadable += 1
    return tuple(restarts), num_unreadable


def read_status(path: Path) -> str:
    """How a run stands, as `train.restarts.Status` names it; "" where nothing readable tells.

    Raises:
        OSError: The file is there and cannot be read.
    """
    try:
        record = parse_object(path.read_bytes()) or {}
    except FileNotFoundError:
        return ""
    status = record.get("status")
    return status if isinstance(status, str) else ""


def _number(value: float) -> float:
    """A number that can be drawn, or NaN."""
    return float(value) if -LARGEST_NUMBER < value < LARGEST_NUMBER else math.nan


FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RunMetrics:
    """What one run logged.

    Attributes:
        name: The run folder's name.
        folder: Where it lies.
        iteration: float64[n], ascending.
        columns: `RUN_FIELDS` to float64[n]; NaN where nothing was logged.
        sources: Source to `SOURCE_FIELDS` to float64[n], in the order they first appear.
        validation_iteration: float64[m], ascending.
        validation: Source to `VALIDATION_FIELDS` to float64[m].
        restarts: When the run was taken up again, in that order.
        status: How it stands or ended, as `train.restarts.Status` names it; "" if unknown.
        num_unreadable_lines: Torn or foreign lines that were passed over.
        config: The resolved configuration, {} where there is none.
        config_text: The same as it stands in the file.
    """

    name: str
    folder: Path
    iteration: FloatArray
    columns: Mapping[str, FloatArray]
    sources: Mapping[str, Mapping[str, FloatArray]]
    validation_iteration: FloatArray
    validation: Mapping[str, Mapping[str, FloatArray]]
    restarts: tuple[Restart, ...]
    status: str
    num_unreadable_lines: int
    config: Mapping[str, Any]
    config_text: str

    def setting(self, section: str, key: str) -> Any:
        """One value of the configuration, or None where it is not given."""
        block = self.config.get(section)
        return block.get(key) if isinstance(block, dict) else None

    def goal(self, key: str) -> int | None:
        """A positive whole number of the configuration's section ``train``."""
        value = self.setting("train", key)
        return value if type(value) is int and 0 < value < 2**63 else None


class RunReader:
    """A run's folder, read as often as one likes; a line that was read is not read again."""

    def __init__(self, folder: Path) -> None:
        """Takes the folder that `--save` named; nothing is read yet."""
        self._folder = folder
        self._lines = LineReader(folder / "metrics.jsonl")

    def read(self) -> RunMetrics:
        """Everything logged so far.

        Raises:
            UserError: If the folder, its metrics or any readable line in them is missing.
        """
        folder, lines = self._folder, self._lines
        if not folder.is_dir():
            raise UserError(f"no such run: {folder}: name the folder that --save wrote")
        if not lines.path.is_file():
            raise UserError(f"no metrics.jsonl in {folder}: name the folder that --save wrote")
        try:
            lines.read_on()
            restarts, num_unreadable = read_restarts(folder / "restarts.jsonl")
            status = read_status(folder / "status.json")
        except OSError as error:
            raise UserError(f"cannot read {lines.path}: {error.strerror}") from None
        training, validation = lines.training, lines.validation
        if not len(training.iteration) and not len(validation.iteration):
            raise UserError(
                f"{lines.path} holds no logged iteration yet: wait for the first log interval"
            )
        config, config_text = _read_config(folder / "config.yaml")
        iteration = np.array(training.iteration, dtype=np.float64)
        columns = {key: _column(training, key) for key in RUN_FIELDS}
        return RunMetrics(
            name=folder.resolve().name,
            folder=folder,
            iteration=iteration,
            columns=columns,
            sources=_by_source(training, SOURCE_FIELDS),
            validation_iteration=np.array(validation.iteration, dtype=np.float64),
            validation=_by_source(validation, VALIDATION_FIELDS),
            restarts=restarts or _counted(iteration, columns) or lines.repeats(),
            status=status,
            num_unreadable_lines=lines.num_unreadable + num_unreadable,
            config=config,
            config_text=config_text,
        )


def read_run(folder: Path) -> RunMetrics:
    """Reads a run's folder once.

    Args:
        folder: What `--save` named.

    Returns:
        Everything logged so far.

    Raises:
        UserError: If the folder, its metrics or any readable line in them is missing.
    """
    return RunReader(folder).read()


def _column(records: Records, key: str) -> FloatArray:
    column = records.columns.get(key)
    if column is None:
        return np.full(len(records.iteration), np.nan)
    return np.array(column, dtype=np.float64)


def _by_source(records: Records, fields: tuple[str, ...]) -> dict[str, dict[str, FloatArray]]:
    nothing = np.full(len(records.iteration), np.nan)
    return {
        name: {
            field: np.array(columns[field], dtype=np.float64) if field in columns else nothing
            for field in fields
        }
        for name, columns in records.blocks.items()
    }


def _counted(iteration: FloatArray, columns: Mapping[str, FloatArray]) -> tuple[Restart, ...]:
    """Restarts that only the metrics' own count tells of."""
    count, lost = (np.nan_to_num(columns[key]) for key in ("num_restarts", "seconds_lost"))
    return tuple(
        Restart(
            iteration=int(iteration[at - 1]) if at else 0,
            attempt=int(count[at]) + 1,
            seconds_lost=float(lost[at] - (lost[at - 1] if at else 0.0)),
        )
        for at in np.flatnonzero(np.diff(count, prepend=0.0) > 0).tolist()
    )


def _read_config(path: Path) -> tuple[dict[str, Any], str]:
    """The configuration and its text, both empty where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
        return parse_yaml(text, str(path)), text
    except FileNotFoundError:
        return {}, ""
    except (UserError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}: restore it or move it away") from None


MAX_POINTS = 360


def condense(
    x: FloatArray,
    y: FloatArray,
    how: Literal["mean", "last", "extreme"] = "mean",
    max_points: int = MAX_POINTS,
) -> tuple[FloatArray, FloatArray]:
    """Cuts a curve into at most `max_points` runs of neighbours and keeps one point of each.

    Args:
        x: float64[n], ascending.
        y: float64[n]; NaN is left out of its run.
        how: `mean` of the run, its `last` value, or the value farthest from 0 (`extreme`).
        max_points: The most points that come back.

    Returns:
        x (each run's last) and y, float64[<= max_points].
    """
    if len(x) <= max_points:
        return x, y
    edges = np.linspace(0, len(x), max_points + 1).astype(np.int64)
    last = edges[1:] - 1
    if how == "last":
        return x[last], y[last]
    runs = [y[begin:end] for begin, end in zip(edges[:-1], edges[1:], strict=True)]
    if how == "mean":
        return x[last], np.array([_mean(run) for run in runs])
    picked = [run[np.argmax(np.nan_to_num(np.abs(run), nan=-1.0))] for run in runs]
    return x[last], np.array(picked)


def smooth(y: FloatArray, window: int) -> FloatArray:
    """Centred moving mean over `window` points (odd), shorter at the ends; NaN stays NaN.

    Args:
        y: float64[n].
        window: Points per mean; 1 changes nothing.

    Returns:
        float64[n].
    """
    if window <= 1 or not len(y):
        return y
    known = np.isfinite(y)
    ones = np.ones(min(window, 2 * len(y) - 1))
    total = np.convolve(np.where(known, y, 0.0), ones, mode="full")
    count = np.convolve(known.astype(np.float64), ones, mode="full")
    start = len(ones) // 2
    total, count = total[start : start + len(y)], count[start : start + len(y)]
    return np.where(known, total / np.maximum(count, 1.0), np.nan)


def smoothing_window(num_points: int) -> int:
    """Odd window for `num_points`: none for short curves, about a thirtieth of long ones."""
    return 1 if num_points < 40 else 2 * (num_points // 60) + 1


TOKENS = "Tokens consumed"
ITERATION = "Iteration"


@dataclass(frozen=True)
class Axis:
    """What a run's curves run along: the tokens consumed, or iterations where no log tells.

    Attributes:
        label: Its name.
        x: float64[n], a value for each logged iteration, ascending.
        iteration: float64[n], the iterations themselves.
    """

    label: str
    x: FloatArray
    iteration: FloatArray

    @classmethod
    def of(cls, run: RunMetrics, column: str = "consumed_tokens", label: str = TOKENS) -> "Axis":
        """The axis along a column that counts; gaps are bridged, and a step back is none."""
        values, known = run.columns[column], np.isfinite(run.columns[column])
        if not known.any():
            return cls(ITERATION, run.iteration, run.iteration)
        x = np.interp(run.iteration, run.iteration[known], values[known])
        return cls(label, np.maximum.accumulate(x), run.iteration)

    def at(self, iterations: FloatArray) -> FloatArray:
        """Where iterations lie, float64[m]; the run began at 0."""
        if not len(self.x) or self.label == ITERATION:
            return iterations
        end = [] if not len(iterations) else [max(float(iterations.max()), self.iteration[-1] + 1)]
        rate = self.x[-1] / max(float(self.iteration[-1]), 1.0)
        beyond = [self.x[-1] + rate * (last - self.iteration[-1]) for last in end]
        known = np.concatenate(([0.0], self.iteration, end))
        return np.interp(iterations, known, np.concatenate(([0.0], self.x, beyond)))


def samples_per_record(run: RunMetrics) -> FloatArray:
    """Samples consumed between each logged iteration and the one before it, float64[n]."""
    consumed = run.columns["consumed_samples"]
    if not len(consumed):
        return consumed
    steps = np.diff(consumed, prepend=0.0)
    covered = float(np.nan_to_num(run.columns["interval"][0], nan=1.0))
    if run.iteration[0] != covered and len(consumed) > 1:
        steps[0] = steps[1]  # the file begins later than the run
    return np.asarray(steps, dtype=np.float64)


def realised_shares(run: RunMetrics) -> dict[str, FloatArray]:
    """Each source's share of what was drawn since the last logged iteration.

    `realised` is of the logged iteration alone; the running token counts know of those between.

    Args:
        run: The run.

    Returns:
        Source to float64[n].
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
    """Samples drawn minus samples planned, per source, after every iteration.

    Only a log without holes tells: one whose rows cover every iteration from the first on.

    Args:
        run: The run.

    Returns:
        Source to float64[n], in samples; {} where the log has holes.
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


def _mean(values: FloatArray) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=RuntimeWarning)  # a run of nothing but gaps
        return float(np.nanmean(values))
