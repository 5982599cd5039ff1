"""The lines of a run's records, as columns of numbers that grow and are cut.

In: ``metrics.jsonl`` and ``restarts.jsonl``, being written, torn by a kill, or from elsewhere. Out:
`Records`, which need eight bytes a number, and `Restart`s. What cannot be read is counted.
"""

import json
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

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
