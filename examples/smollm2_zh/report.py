"""Selects the SmolLM2 example's held-out text and summarizes the results of its evaluations."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_chatflow.files import write_atomically

HELD_OUT_FORMATS = {
    "english": "text",
    "chinese": "text",
    "parallel": "pairs",
    "instruction": "chat",
}
_MAX_CHARACTERS = 1500


def hold_out(corpus: Path, folder: Path, num_bytes: int) -> dict[str, Path]:
    """Writes the subset of each source's held-out text that models are evaluated on.

    Documents are taken at a fixed stride, and plain text is cut to its first 1,500 characters, so
    that the subset covers all kinds of text of a source.

    Args:
        corpus: The folder with ``<source>.valid.jsonl``.
        folder: The output folder.
        num_bytes: Approximate bytes of each source.

    Returns:
        The file of each source.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for source in HELD_OUT_FORMATS:
        paths[source] = folder / f"{source}.jsonl"
        if paths[source].exists():
            continue
        lines = (corpus / f"{source}.valid.jsonl").read_text(encoding="utf-8").splitlines()
        documents = [json.loads(line) for line in lines]
        for document in documents:
            if "text" in document:
                document["text"] = document["text"][:_MAX_CHARACTERS]
        texts = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
        total = sum(len(text.encode()) for text in texts)
        stride = max(1, round(total / num_bytes))
        write_atomically(paths[source], "".join(texts[::stride]))
    return paths


def summarize(folder: Path, variants: Iterable[str]) -> dict[str, Any]:
    """Collects the results of the complete variants in ``folder``."""
    summary: dict[str, Any] = {
        "bits_per_byte": {"SmolLM2": _bits(folder / "base.json")},
        "samples": {"SmolLM2": _read(folder / "base.txt")},
        "training": {},
    }
    for variant in variants:
        part = folder / variant
        if not (part / "export.txt").exists():
            continue
        if (part / "start.json").exists():
            summary["bits_per_byte"][f"{variant}, before"] = _bits(part / "start.json")
        summary["bits_per_byte"][f"{variant}, after"] = _bits(part / "export.json")
        summary["samples"][f"{variant}, after"] = _read(part / "export.txt")
        summary["training"][variant] = _training(part / "run" / "metrics.jsonl")
    return summary


def markdown_table(summary: Mapping[str, Any]) -> str:
    """Formats the summary as Markdown."""
    columns = summary["bits_per_byte"]
    rows = [
        [name, *(f"{bits[name]:.3f}" for bits in columns.values())] for name in HELD_OUT_FORMATS
    ]
    lines = [*_table(["bits per byte", *columns], rows), ""]
    rows = [
        [name, str(run["iterations"]), f"{run['tokens']:,}", f"{run['tokens_per_second']:.0f}"]
        for name, run in summary["training"].items()
    ]
    lines += [*_table(["variant", "iterations", "tokens", "tokens/s (median)"], rows), ""]
    samples = summary["samples"]
    rows = [
        [prompt, *(" ".join(answers[prompt].split()) for answers in samples.values())]
        for prompt in samples["SmolLM2"]
    ]
    lines += _table(["prompt", *samples], rows)
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)]


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _bits(path: Path) -> dict[str, float]:
    (result,) = _read(path)
    return {name: result["sources"][name]["bits_per_byte"] for name in HELD_OUT_FORMATS}


def _training(path: Path) -> dict[str, Any]:
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    iterations = [entry for entry in entries if "lm_loss" in entry]
    return {
        "iterations": iterations[-1]["iteration"],
        "tokens": iterations[-1]["consumed_tokens"],
        "tokens_per_second": statistics.median(e["tokens_per_second"] for e in iterations),
    }
