"""Findings: what is suspicious about a run's data, though not wrong enough to refuse the run.

Each finding is one line that names the source, the observation and the remedy. They are collected
in `RunInputs.findings`, which the dry run prints and every start logs as warnings.
"""

from collections.abc import Sequence
from typing import Any

from megatron_chatflow.native.samples import TokenFile


def source_findings(
    label: str, files: Sequence[TokenFile], facts: Sequence[dict[str, Any]]
) -> list[str]:
    """Reports what is suspicious about one source's datasets.

    Args:
        label: Begins every finding, such as ``data.sources.en``.
        files: The source's datasets.
        facts: What `dataset_facts` returned for each of them.
    """
    findings = []
    unchecked = [
        file.name for file, fact in zip(files, facts, strict=True) if not fact["tokenizer"]
    ]
    if unchecked:
        findings.append(
            f"{label}: {_count(unchecked, files)} no .json (first: {unchecked[0]}.json), so it is "
            "unchecked which tokenizer made the ids: decode a few documents with "
            "tools/inspect_dataset.py, or preprocess the data again"
        )
    return findings


def _count(chosen: Sequence[object], files: Sequence[object]) -> str:
    """Such as ``3 of 5 datasets have``."""
    verb = "has" if len(chosen) == 1 else "have"
    return f"{len(chosen)} of {len(files)} datasets {verb}"
