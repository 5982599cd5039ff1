"""Reads what a run left behind into arrays that the report draws.

A run's folder has `metrics.jsonl`, `restarts.jsonl`, `status.json` and `config.yaml`, whether it is
finished or still running. A `RunMetrics` has one entry per logged iteration and one per validation,
in order, without repetitions. Reading again reads what is new, so that a page can follow a run of a
million lines.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_chatflow.config.yaml_file import parse_yaml
from megatron_chatflow.errors import UserError
from megatron_chatflow.evaluation.report_lines import (
    RUN_FIELDS,
    SOURCE_FIELDS,
    VALIDATION_FIELDS,
    LineReader,
    Records,
    Restart,
    read_restarts,
    read_status,
)

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
