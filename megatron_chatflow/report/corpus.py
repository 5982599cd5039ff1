"""Describes a text corpus as one HTML page: languages, lengths, duplicates, fertility, filters.

All documents are counted. Languages, near-duplicates, fertility and the results of filters are
those of a sample: the distinct texts with the smallest hashes, which does not depend on the order
of the files. Sections whose package is not installed are left out and named.
"""

import heapq
import html
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from megatron_chatflow.errors import UserError
from megatron_chatflow.files import check_output_file, scratch_folder, write_output_file
from megatron_chatflow.preprocess.cleaning.job import MinHashSettings
from megatron_chatflow.preprocess.cleaning.texts import (
    language_identifier,
    limit_punctuation,
    without_boilerplate,
    words_of,
)
from megatron_chatflow.preprocess.dedup import SeenHashes, hashes_of
from megatron_chatflow.preprocess.parse import parse_chunk
from megatron_chatflow.preprocess.readers import CorpusReader, find_inputs
from megatron_chatflow.preprocess.settings import CorpusSettings
from megatron_chatflow.report.charts import GREY, PALETTE, Chart, as_text, new_figure
from megatron_chatflow.report.page import chart_grid, html_page, html_table
from megatron_chatflow.runtime.table import format_percent, format_value
from megatron_chatflow.tokenizer import load_tokenizer

MAX_LANGUAGES = 12
NUM_EXAMPLES = 2
EXAMPLE_CHARACTERS = 240
BINS_PER_DOUBLING = 2


@dataclass
class CorpusStatistics:
    """The statistics of a corpus."""

    num_documents: int = 0
    num_bytes: int = 0  # of the texts in UTF-8
    num_characters: int = 0
    num_duplicates: int = 0  # documents with the text of an earlier one
    bad_lines: Counter[str] = field(default_factory=Counter)
    # number of documents by the logarithm of their length, in `BINS_PER_DOUBLING`
    lengths: Counter[int] = field(default_factory=Counter)
    num_sampled: int = 0
    languages: Counter[str] = field(default_factory=Counter)
    num_near_duplicates: int | None = None  # of the sample, without one of each group
    # by language: tokens, bytes, characters and words
    fertility: dict[str, list[int]] = field(default_factory=dict)
    # by filter and reason: number of dropped documents, and the begin of some of them
    filters: dict[tuple[str, str], tuple[int, list[str]]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)  # sections without their package


def write_corpus_report(
    inputs: Sequence[str],
    output: Path,
    settings: CorpusSettings,
    *,
    tokenizer_model: str | None = None,
    num_sampled: int = 5000,
    title: str = "",
) -> CorpusStatistics:
    """Reads a corpus and writes its page.

    Args:
        inputs: Files, folders or globs.
        output: The HTML file.
        settings: Settings for reading the inputs, with one key.
        tokenizer_model: A tokenizer for the fertility; None for none.
        num_sampled: Maximum number of sampled documents.
        title: Title of the page; empty for the inputs.

    Raises:
        UserError: An input cannot be read, there is no document, the file cannot be written, or
            plotly is not installed.
    """
    if num_sampled < 1:
        raise UserError(f"--sample {num_sampled}: must be at least 1")
    check_output_file(output)
    html_page("", [], "")  # plotly is needed after all else
    statistics = measure_corpus(
        inputs, settings, tokenizer_model=tokenizer_model, num_sampled=num_sampled
    )
    page = build_corpus_page(statistics, title or " ".join(inputs), datetime.now(timezone.utc))
    write_output_file(output, page.encode("utf-8", errors="replace"))
    return statistics


def measure_corpus(
    inputs: Sequence[str],
    settings: CorpusSettings,
    *,
    tokenizer_model: str | None = None,
    num_sampled: int = 5000,
) -> CorpusStatistics:
    """Reads a corpus once and measures it, as in `write_corpus_report`."""
    statistics = CorpusStatistics()
    tokenizer = None if tokenizer_model is None else load_tokenizer(tokenizer_model)
    sample: list[tuple[int, str]] = []  # a heap of the smallest hashes, negated
    with scratch_folder("chatflow_report.") as folder:
        seen = SeenHashes(folder)
        for chunk in CorpusReader(find_inputs(inputs), settings).chunks():
            parsed = parse_chunk(chunk, settings)
            statistics.bad_lines.update(parsed.bad_lines)
            texts = [text for text in parsed.documents[settings.json_keys[0]] if str(text).strip()]
            if not texts:
                continue
            encoded = [str(text).encode() for text in texts]
            hashes = hashes_of(encoded)
            is_new = seen.add(hashes)
            statistics.num_duplicates += int((~is_new).sum())
            for text, utf8, key, new in zip(texts, encoded, hashes[:, 0], is_new, strict=True):
                _count(statistics, str(text), utf8)
                item = (-int(key), str(text))
                if new and len(sample) < num_sampled:
                    heapq.heappush(sample, item)
                elif new and item > sample[0]:
                    heapq.heapreplace(sample, item)
    if not statistics.num_documents:
        bad = ", ".join(f"{count} {name}" for name, count in statistics.bad_lines.items())
        raise UserError(f"no document in {' '.join(inputs)}{bad and f': {bad}'}")
    texts_of_sample = [text for _, text in sorted(sample, reverse=True)]
    statistics.num_sampled = len(texts_of_sample)
    languages = _languages(statistics, texts_of_sample)
    if tokenizer is not None:
        of_language: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
        for text, language in zip(texts_of_sample, languages, strict=True):
            counts = (
                len(tokenizer.encode(text)),
                len(text.encode()),
                len(text),
                len(words_of(text)),
            )
            of_language[language] = [
                a + b for a, b in zip(of_language[language], counts, strict=True)
            ]
        statistics.fertility = dict(of_language)
    _apply_filters(statistics, texts_of_sample)
    return statistics


def _count(statistics: CorpusStatistics, text: str, utf8: bytes) -> None:
    statistics.num_documents += 1
    statistics.num_bytes += len(utf8)
    statistics.num_characters += len(text)
    statistics.lengths[int(np.log2(len(text)) * BINS_PER_DOUBLING)] += 1


def _languages(statistics: CorpusStatistics, texts: Sequence[str]) -> list[str]:
    try:
        identify = language_identifier()
    except UserError:
        statistics.missing.append("languages (pip install py3langid)")
        return ["all"] * len(texts)
    languages = [identify(text)[0] for text in texts]
    statistics.languages.update(languages)
    return languages


def _apply_filters(statistics: CorpusStatistics, texts: Sequence[str]) -> None:
    """Counts near-duplicates and what the filters would drop or change."""

    def record(name: str, reason: str, text: str) -> None:
        count, examples = statistics.filters.get((name, reason), (0, []))
        if len(examples) < NUM_EXAMPLES:
            examples = [*examples, text[:EXAMPLE_CHARACTERS]]
        statistics.filters[name, reason] = (count + 1, examples)

    for text in texts:
        if without_boilerplate(text)[1]:
            record("boilerplate", "has lines that are removed", text)
        if limit_punctuation(text, 3) != text:
            record("punctuation", "has runs of more than 3 marks", text)
    try:
        from datatrove.data import Document
        from datatrove.pipeline.dedup import MinhashDedupSignature

        from megatron_chatflow.preprocess.cleaning import steps
    except ImportError:
        statistics.missing.append("near-duplicates and quality filters (pip install datatrove)")
        return
    for name, make in steps.QUALITY_FILTERS.items():
        quality = steps.ByScript(name, *make())
        for text in texts:
            result = quality.filter(Document(text, ""))
            if isinstance(result, tuple) and not result[0]:
                record(name, result[1], text)
    with scratch_folder("chatflow_report.") as folder:
        minhash = MinHashSettings()
        config = steps.minhash_config(minhash.num_words, minhash.num_buckets, minhash.num_hashes)
        signatures = MinhashDedupSignature(str(folder), config, steps.WORDS)
        groups = list(range(len(texts)))

        def root(k: int) -> int:
            while groups[k] != k:
                groups[k] = groups[groups[k]]
                k = groups[k]
            return k

        first: dict[tuple[int, ...], int] = {}
        for k, text in enumerate(texts):
            shingles = signatures.get_shingles(text)
            if shingles.size == 0:
                continue
            for bucket, signature in enumerate(signatures.get_signature(shingles)):
                groups[root(k)] = root(first.setdefault((bucket, *signature), k))
    statistics.num_near_duplicates = len(texts) - len({root(k) for k in range(len(texts))})


def build_corpus_page(statistics: CorpusStatistics, title: str, now: datetime) -> str:
    """Builds the HTML page of a corpus."""
    n, size = statistics.num_documents, f"{statistics.num_bytes / 1e6:,.1f} MB"
    sampled = f"{statistics.num_sampled:,} sampled documents"
    tiles = [
        ("Documents", f"{n:,}", ""),
        ("Text", size, f"{statistics.num_characters:,} characters"),
        ("Exact duplicates", format_percent(statistics.num_duplicates / n),
         f"{statistics.num_duplicates:,} documents"),
    ]  # fmt: skip
    if statistics.num_near_duplicates is not None:
        share = statistics.num_near_duplicates / statistics.num_sampled
        tiles.append(("Near-duplicates", format_percent(share), f"of {sampled}; a lower bound"))
    if statistics.bad_lines:
        tiles.append(("Bad records", f"{sum(statistics.bad_lines.values()):,}", "not documents"))
    boxes = "".join(
        f'<div class="tile"><dt>{name}</dt><dd>{value}</dd><small>{note}</small></div>'
        for name, value, note in tiles
    )
    charts = [_length_chart(statistics)]
    if statistics.languages:
        charts.append(_language_chart(statistics, sampled))
    sections = [("Lengths and languages", chart_grid(charts))]
    if statistics.fertility:
        sections.append(("Fertility", _fertility_table(statistics, sampled)))
    sections.append(("Filters", _filters_table(statistics, sampled)))
    if statistics.bad_lines:
        rows = [[html.escape(name), f"{k:,}"] for name, k in statistics.bad_lines.most_common()]
        sections.append(
            (
                "Bad records",
                html_table("Records that are not documents.", ["Reason", "Number"], rows),
            )
        )
    body = "".join(f"<section><h2>{head}</h2>{text}</section>\n" for head, text in sections if text)
    lead = f"Languages, fertility and filters: {sampled}."
    if statistics.missing:
        lead += f" Left out: {'; '.join(statistics.missing)}."
    article = (
        f'<article id="corpus"><h1>{html.escape(title)}</h1><p class="lead">{lead}</p>'
        f'<dl class="tiles">{boxes}</dl>\n{body}</article>'
    )
    footer = f"megatron_chatflow · {now:%Y-%m-%d %H:%M} UTC."
    return html_page(f"{title} – corpus report", [article], footer)


def _length_chart(statistics: CorpusStatistics) -> Chart:
    bins = range(min(statistics.lengths), max(statistics.lengths) + 1)
    edges = [2 ** (k / BINS_PER_DOUBLING) for k in bins]
    return Chart(
        "Lengths",
        "Documents by their number of characters.",
        _bars([f"{edge:,.0f}" for edge in edges], [statistics.lengths[k] for k in bins],
              "Characters (at least)", "Documents"),
    )  # fmt: skip


def _language_chart(statistics: CorpusStatistics, sampled: str) -> Chart:
    counts = statistics.languages.most_common(MAX_LANGUAGES)
    others = sum(statistics.languages.values()) - sum(count for _, count in counts)
    counts += [("others", others)] if others else []
    return Chart(
        "Languages",
        f"Documents by language, of {sampled}.",
        _bars([name for name, _ in counts], [count for _, count in counts], "Language",
              "Documents"),
    )  # fmt: skip


def _bars(names: Sequence[str], values: Sequence[float], x_label: str, y_label: str) -> Any:
    figure = new_figure(x_label, y_label, [])
    colors = [GREY if name == "others" else PALETTE[0] for name in names]
    figure.add_bar(
        name=as_text(y_label),
        x=[as_text(name) for name in names],
        y=list(values),
        marker={"color": colors},
        showlegend=False,
    )
    figure.update_xaxes(type="category", hoverformat="")
    return figure


def _fertility_table(statistics: CorpusStatistics, sampled: str) -> str:
    rows = [
        [
            html.escape(language),
            f"{tokens:,}",
            format_value(tokens / max(num_characters, 1)),
            format_value(num_bytes / max(tokens, 1)),
            format_value(tokens / max(num_words, 1)),
        ]
        for language, (tokens, num_bytes, num_characters, num_words) in sorted(
            statistics.fertility.items(), key=lambda item: -item[1][0]
        )
    ]
    heads = ["Language", "Tokens", "Tokens a character", "Bytes a token", "Tokens a word"]
    caption = (
        f"Of {sampled}. A word of Chinese and of other scripts without spaces is one character; "
        "punctuation marks count as words."
    )
    return html_table(caption, heads, rows)


def _filters_table(statistics: CorpusStatistics, sampled: str) -> str:
    rows = [
        [
            html.escape(f"{name}: {reason}"),
            f"{count:,}",
            format_percent(count / statistics.num_sampled),
            "<br>".join(html.escape(_one_line(example)) for example in examples),
        ]
        for (name, reason), (count, examples) in sorted(
            statistics.filters.items(), key=lambda item: (item[0][0], -item[1][0])
        )
    ]
    caption = f"What each filter alone would drop or change of {sampled}, with examples."
    heads = ["Filter and reason", "Documents", "Share", "Beginnings of some of them"]
    return html_table(caption, heads, rows, num_text_columns=1)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def describe(statistics: CorpusStatistics) -> Iterable[str]:
    """Yields the most important numbers as lines of text."""
    yield (
        f"{statistics.num_documents} documents, {statistics.num_bytes / 1e6:.1f} MB, "
        f"{statistics.num_duplicates} exact duplicates"
    )
    if statistics.languages:
        names = ", ".join(f"{name} {n}" for name, n in statistics.languages.most_common(5))
        yield f"languages of {statistics.num_sampled} sampled documents: {names}"
