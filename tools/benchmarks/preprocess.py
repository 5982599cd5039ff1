"""Cost of tokenizing a corpus: CPU seconds, wall time and memory, beside Megatron-LM's scripts.

Prints rows for the input of each language (by default the demo's corpus), for every contender, for
upper bounds of the machine ("roofs": parsing JSON only, writing and reading bytes only), and for a
merge beside the speed of the disk.

Every contender is a process of its own that reads the same file and writes a dataset. Its start-up
time, measured with a file of one document, is subtracted and reported separately. Rounds alternate,
and the best round of each contender counts. MB are 10^6 bytes of UTF-8 text. `corpora` describes
how the text is recombined to a given size and what that favours; rows "as it is" use the corpus
itself.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import orjson

from benchmarks.contenders import (
    FAST,
    OURS,
    SENTENCEPIECE,
    STANDARD,
    Contender,
    Usage,
    megatron_fast_tool,
    megatron_tool,
    our_tool,
    sentencepiece_loop,
)
from benchmarks.corpora import (
    GeneratedCorpus,
    read_texts,
    write_distinct,
    write_recombined,
)
from benchmarks.disk import disk_rows, merge_rows
from megatron_chatflow.data.indexed import IndexedDataset
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import scratch_folder
from megatron_chatflow.runtime.table import Cell, Row
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer

PARTS = ("text", "roofs", "merge")
_DEMO = Path(".demo/corpus")
# The quantity and the minimum ratio of a peer's cost to ours, by peer and language.
_TARGETS = {
    (STANDARD, "english"): ("cpu_seconds", 8.0),
    (STANDARD, "chinese"): ("cpu_seconds", 5.0),
    (FAST, "english"): ("seconds", 2.0),
    (FAST, "chinese"): ("seconds", 2.0),
}
_MAX_RSS_BYTES = 300_000_000
_START_NOISE = 0.1  # the variation of start-up times, as a fraction


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    add = parser.add_argument
    add("--corpus", type=Path, default=_DEMO, help="folder with LANGUAGE.train.jsonl")
    add("--languages", nargs="+", default=["english", "chinese"])
    add("--tokenizer-model", type=Path, default=_DEMO / "tokenizer.model")
    add(
        "--megabytes",
        type=int,
        default=200,
        help="size of the recombined text in MB; default: %(default)s",
    )
    add("--workers", type=int, nargs="+", default=[1, 2])
    add("--rounds", type=int, default=2)
    add("--seed", type=int, default=1)
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--scratch", type=Path, help="folder on the disk to measure (default: a temporary folder)")
    add("--megatron-path", type=Path, help="Megatron-LM checkout whose scripts are measured")
    python = Path(sys.executable)
    add("--megatron-python", type=Path, default=python, help="Python interpreter for these scripts")


def run(arguments: argparse.Namespace) -> list[Row]:
    """Runs the benchmark, see the module docstring.

    Raises:
        UserError: A corpus or the model cannot be read, or a contender fails.
    """
    if min(arguments.megabytes, arguments.rounds, *arguments.workers) < 1:
        raise UserError("--megabytes, --rounds and --workers: must be at least 1")
    rows: list[Row] = []
    with scratch_folder("benchmark_", arguments.scratch) as folder:
        if {"text", "roofs"} & set(arguments.parts):
            tokenizer = load_tokenizer(arguments.tokenizer_model)
            for language in arguments.languages:
                rows += _language_rows(language, tokenizer, arguments, folder)
        num_bytes = arguments.megabytes * 10**6
        if "roofs" in arguments.parts:
            rows += disk_rows(folder, max(num_bytes, 10**8), arguments.rounds)
        if "merge" in arguments.parts:
            rows += merge_rows(folder, 5 * num_bytes, arguments.rounds)
    return rows


def _language_rows(
    language: str, tokenizer: Tokenizer, arguments: argparse.Namespace, folder: Path
) -> Iterator[Row]:
    texts = read_texts(arguments.corpus / f"{language}.train.jsonl")
    distinct = write_distinct(texts, folder / f"{language}_as_it_is.jsonl")
    num_bytes = arguments.megabytes * 10**6
    large = write_recombined(texts, folder / f"{language}.jsonl", num_bytes, arguments.seed)
    first = write_distinct(texts[:1], folder / "first.jsonl")
    made = {"as it is": distinct, "recombined": large}
    for kind, corpus in made.items():
        yield {
            "what": f"{language}, {kind}",
            "by": "input",
            "text_bytes": corpus.num_text_bytes,
            "num_documents": corpus.num_documents,
            "num_distinct_words": corpus.num_distinct_words,
            "num_distinct_sentences": corpus.num_distinct_sentences,
            "tokenizer_sha256": tokenizer.fingerprint[:12],
        }
    if "text" in arguments.parts:
        contenders = _contenders(tokenizer, arguments, folder)
        for kind, corpus in made.items():
            yield from _measure_contenders(
                language, kind, corpus, first, contenders, arguments, tokenizer
            )
    if "roofs" in arguments.parts:
        yield from _parse_rows(language, large, arguments.rounds)
    for corpus in made.values():
        corpus.path.unlink()


def _contenders(
    tokenizer: Tokenizer, arguments: argparse.Namespace, folder: Path
) -> list[Contender]:
    model, checkout = tokenizer.model_path.resolve(), arguments.megatron_path
    contenders = [our_tool(model, number) for number in arguments.workers]
    is_sentencepiece = tokenizer.tokenizer_type == "Llama2Tokenizer"
    if checkout is not None:
        python = str(arguments.megatron_python)
        hugging_face = folder / "hugging_face"
        tokenizer.save_pretrained(hugging_face)
        given = model if is_sentencepiece else hugging_face
        contenders += [
            megatron_tool(checkout, python, given, tokenizer.tokenizer_type, number)
            for number in arguments.workers
        ]
        contenders.append(megatron_fast_tool(checkout, python, hugging_face))
    if arguments.peers and is_sentencepiece:
        contenders.append(sentencepiece_loop(model, tokenizer.eos_id))
    return contenders


def _measure_contenders(
    language: str,
    kind: str,
    corpus: GeneratedCorpus,
    first: GeneratedCorpus,
    contenders: list[Contender],
    arguments: argparse.Namespace,
    tokenizer: Tokenizer,
) -> Iterator[Row]:
    folder = corpus.path.parent
    prefixes = [folder / f"out{number}" for number in range(len(contenders))]
    starts: list[list[Usage]] = [[] for _ in contenders]
    usages: list[list[Usage]] = [[] for _ in contenders]
    for round_number in range(arguments.rounds):
        for number, contender in enumerate(contenders):
            print(f"{language}, {kind}: {contender.name}, round {round_number}", file=sys.stderr)
            starts[number].append(contender.run(first.path, prefixes[number]))
            usages[number].append(contender.run(corpus.path, prefixes[number]))
    ours: dict[int, Row] = {}
    for number, contender in enumerate(contenders):
        row = _cost(starts[number], usages[number], corpus.num_text_bytes)
        row = {"what": f"{language}, {kind}", "by": contender.name, **row}
        row["num_workers"] = contender.num_workers
        if contender.name == OURS:
            ours[contender.num_workers or 0] = row
            if kind == "recombined":
                row["target"] = f"RSS <= {_MAX_RSS_BYTES / 1e6:.0f} MB"
                row["met"] = usages[number][0].rss_bytes <= _MAX_RSS_BYTES
        else:
            beside = ours.get(contender.num_workers or 0, ours[max(ours)])
            aimed_at = language if kind == "recombined" else None
            row.update(_ratios(row, beside, contender.name, aimed_at))
            row.update(_differences(contender.name, prefixes[0], prefixes[number], tokenizer))
        yield row
    for path in folder.glob("out*"):
        path.unlink()


def _cost(starts: list[Usage], usages: list[Usage], num_bytes: int) -> dict[str, Cell]:
    """Returns the best round with the best start-up subtracted."""
    start_seconds = min(usage.seconds for usage in starts)
    start_cpu_seconds = min(usage.cpu_seconds for usage in starts)
    seconds = _without_startup(min(usage.seconds for usage in usages), start_seconds)
    cpu_seconds = _without_startup(min(usage.cpu_seconds for usage in usages), start_cpu_seconds)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "mb_per_second": None if seconds is None else num_bytes / 1e6 / seconds,
        "mb_per_cpu_second": None if cpu_seconds is None else num_bytes / 1e6 / cpu_seconds,
        "start_seconds": start_seconds,
        "start_cpu_seconds": start_cpu_seconds,
        "rss_bytes": max(usage.rss_bytes for usage in usages),
        "pss_bytes": max(usage.pss_bytes for usage in usages),
    }


def _without_startup(whole: float, start: float) -> float | None:
    """Subtracts the start-up. Returns None if the rest is within the variation of start-ups."""
    return whole - start if whole - start > _START_NOISE * start else None


def _ratios(row: dict[str, Cell], ours: Row, name: str, language: str | None) -> dict[str, Cell]:
    """Returns a peer's costs as multiples of ours, and whether the target is met.

    Args:
        row: The peer's row.
        ours: Our row with as many workers.
        name: Name of the peer.
        language: Language of the corpus, None if there is no target.
    """
    found: dict[str, Cell] = {}
    for cost in ("seconds", "cpu_seconds"):
        theirs, own = row[cost], ours[cost]
        if isinstance(theirs, float) and isinstance(own, float):
            found[f"times_our_{cost}"] = theirs / own
    if (name, language) in _TARGETS:
        cost, least = _TARGETS[name, language or ""]
        ratio = found.get(f"times_our_{cost}")
        found["target"] = f"{least:g} times our {cost}"
        found["met"] = isinstance(ratio, float) and ratio >= least
    return found


def _differences(name: str, ours: Path, theirs: Path, tokenizer: Tokenizer) -> dict[str, Cell]:
    """Counts documents whose ids differ from ours, and those among them with control ids."""
    own = IndexedDataset(f"{ours}_text_document")
    if name == SENTENCEPIECE:
        same = np.array_equal(np.fromfile(theirs, np.int32), own.tokens)
        return {"num_different_documents": 0 if same else None}
    other = IndexedDataset(f"{theirs}_text_document")
    if np.array_equal(own.tokens, other.tokens) and np.array_equal(
        own.sequence_lengths, other.sequence_lengths
    ):
        return {"num_different_documents": 0, "num_with_control_ids": 0}
    if len(own) != len(other):
        return {"num_different_documents": None, "num_with_control_ids": None}
    different = [k for k in range(len(own)) if not np.array_equal(own[k], other[k])]
    control = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id]
    with_control = sum(bool(np.isin(other[k][:-1], control).any()) for k in different)
    return {"num_different_documents": len(different), "num_with_control_ids": with_control}


def _parse_rows(language: str, corpus: GeneratedCorpus, num_rounds: int) -> Iterator[Row]:
    """Measures parsing JSON alone, on one core, from memory."""
    lines = corpus.path.read_bytes().splitlines()
    parsers: dict[str, Callable[[bytes], object]] = {"orjson": orjson.loads, "json": json.loads}
    for name, parse in parsers.items():
        best = float("inf")
        for _ in range(num_rounds):
            begin = time.perf_counter()
            for line in lines:
                parse(line)
            best = min(best, time.perf_counter() - begin)
        yield {
            "what": f"{language}, recombined",
            "by": f"roof: {name} alone",
            "num_workers": 1,
            "seconds": best,
            "mb_per_second": corpus.num_text_bytes / 1e6 / best,
        }
