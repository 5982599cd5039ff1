"""Findings: what is suspicious about a run's data, though not wrong enough to refuse the run.

Each finding is one line that names the source, the observation and the remedy. They are collected
in `RunInputs.findings`, which the dry run prints and every start logs as warnings.
"""

from collections.abc import Sequence
from typing import Any

from megatron_chatflow.data.packing_cache import Packing
from megatron_chatflow.native.samples import TokenFile

MANY_CUT_TOKENS = 0.01
"""Share of a source's tokens from which on those that packing cuts off are reported."""


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


def packing_findings(label: str, packing: Packing, seq_length: int) -> list[str]:
    """Reports documents that packing leaves out, and a large share of tokens that it cuts off.

    Args:
        label: Begins every finding.
        packing: The source's.
        seq_length: Inputs of a sample.
    """
    findings = []
    num_packed, num_tokens = len(packing.documents), packing.num_tokens
    if packing.num_without_loss:
        num_documents = num_packed + packing.num_without_loss
        findings.append(
            f"{label}: packing leaves out {packing.num_without_loss:,} of {num_documents:,} "
            f"documents, which have no loss token in their first {seq_length + 1:,} tokens: raise "
            "data.seq_length if their prompts are longer than that"
        )
    share = packing.num_truncated_tokens / max(num_tokens + packing.num_truncated_tokens, 1)
    if share > MANY_CUT_TOKENS:
        findings.append(
            f"{label}: packing cuts {packing.num_truncated:,} of {num_packed:,} documents to "
            f"{seq_length + 1:,} tokens and never trains {packing.num_truncated_tokens:,} tokens "
            f"({share:.1%}): split long documents, raise data.seq_length, or set packing: none"
        )
    return findings


def _count(chosen: Sequence[object], files: Sequence[object]) -> str:
    """Such as ``3 of 5 datasets have``."""
    verb = "has" if len(chosen) == 1 else "have"
    return f"{len(chosen)} of {len(files)} datasets {verb}"
