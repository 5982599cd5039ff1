"""Reads what a run left behind into arrays that the report draws.

In: a run's folder (`metrics.jsonl`, `config.yaml`), finished or still running. Out: a `RunMetrics`
with one entry per logged iteration and one per validation, in order, without repetitions.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from megatron_chatflow.errors import UserError

FloatArray = npt.NDArray[np.float64]

RUN_FIELDS = (
    "consumed_samples",
    "consumed_tokens",
    "lm_loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "tflops_per_gpu",
    "mfu",
)
SOURCE_FIELDS = ("loss", "weight", "realised", "tokens", "loss_tokens", "epochs")
VALIDATION_FIELDS = ("loss", "bits_per_byte")


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
        resumed_at: First iterations after each resume that re-did logged iterations.
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
    resumed_at: tuple[int, ...]
    num_unreadable_lines: int
    config: Mapping[str, Any]
    config_text: str

    def setting(self, section: str, key: str) -> Any:
        """One value of the configuration, or None where it is not given."""
        block = self.config.get(section)
        return block.get(key) if isinstance(block, dict) else None


def read_run(folder: Path) -> RunMetrics:
    """Reads a run's folder.

    Args:
        folder: What `--save` named.

    Returns:
        Everything logged so far.

    Raises:
        UserError: If the folder, its metrics or any readable line in them is missing.
    """
    path = folder / "metrics.jsonl"
    if not folder.is_dir():
        raise UserError(f"no such run: {folder}: name the folder that --save wrote")
    if not path.is_file():
        raise UserError(f"no metrics.jsonl in {folder}: name the folder that --save wrote")
    records, num_unreadable = _parse(path.read_bytes())
    training, validation, resumed_at = _drop_repeated(records)
    if not training and not validation:
        raise UserError(f"{path} holds no logged iteration yet: wait for the first log interval")
    config_path = folder / "config.yaml"
    config_text = config_path.read_text(encoding="utf-8") if config_path.is_file() else ""
    return RunMetrics(
        name=folder.resolve().name,
        folder=folder,
        iteration=_column(training, "iteration"),
        columns={key: _column(training, key) for key in RUN_FIELDS},
        sources=_nested(training, "sources", SOURCE_FIELDS),
        validation_iteration=_column(validation, "iteration"),
        validation=_nested(validation, "validation", VALIDATION_FIELDS),
        resumed_at=resumed_at,
        num_unreadable_lines=num_unreadable,
        config=_parse_config(config_path, config_text),
        config_text=config_text,
    )


def _parse(raw: bytes) -> tuple[list[dict[str, Any]], int]:
    """JSON objects of the lines, and how many lines were none: a killed run leaves a torn one."""
    records: list[dict[str, Any]] = []
    num_unreadable = 0
    for line in raw.splitlines():
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:  # both malformed JSON and bytes that are not UTF-8
            record = None
        if isinstance(record, dict) and isinstance(record.get("iteration"), int):
            records.append(record)
        else:
            num_unreadable += 1
    return records, num_unreadable


def _drop_repeated(
    records: Iterable[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], tuple[int, ...]]:
    """Keeps the last account of every iteration.

    A training record of iteration i that follows one of a later iteration means that the run was
    resumed before i: what was logged from i on belongs to a future that was given up.
    """
    training: list[dict[str, Any]] = []
    validation: list[dict[str, Any]] = []
    resumed_at: list[int] = []
    for record in records:
        iteration = record["iteration"]
        if "choice" in record:
            continue
        if "validation" in record:
            _truncate(validation, iteration)
            validation.append(record)
            continue
        if _truncate(training, iteration):
            resumed_at = [at for at in resumed_at if at < iteration] + [iteration]
            _truncate(validation, iteration)
        training.append(record)
    return training, validation, tuple(resumed_at)


def _truncate(records: list[dict[str, Any]], iteration: int) -> bool:
    """Removes the records from `iteration` on; true if there were any."""
    before = len(records)
    while records and records[-1]["iteration"] >= iteration:
        records.pop()
    return len(records) < before


def _number(value: object) -> float:
    """A finite number or NaN."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return math.nan


def _column(records: list[dict[str, Any]], key: str) -> FloatArray:
    return np.array([_number(record.get(key)) for record in records], dtype=np.float64)


def _nested(
    records: list[dict[str, Any]], block: str, fields: tuple[str, ...]
) -> dict[str, dict[str, FloatArray]]:
    """Turns records of {block: {source: {field: value}}} into source to field to float64[n]."""
    blocks = [record.get(block) or {} for record in records]
    names = list(dict.fromkeys(name for entry in blocks for name in entry))
    return {
        name: {
            field: np.array(
                [_number((entry.get(name) or {}).get(field)) for entry in blocks], dtype=np.float64
            )
            for field in fields
        }
        for name in names
    }


def _parse_config(path: Path, text: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}: restore it or move it away") from None
    return config if isinstance(config, dict) else {}
