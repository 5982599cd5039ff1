"""What every extractor shares: documents, blocks of prose, and the normalization of plain text."""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Character ranges of Chinese characters, for use inside a regular expression's class."""

_HAN = re.compile(f"[{HAN}]")
# Soft hyphens, zero-width characters, direction marks, byte-order marks, and replacement
# characters, as well as control characters other than tab and newline.
_INVISIBLE = re.compile(
    "[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufffd\x00-\x08\x0b-\x1f\x7f-\x9f]"
)
_SPACES = re.compile("[ \t\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]+")
_BLANK_LINES = re.compile(r"\n{3,}")
_SENTENCE_END = re.compile(r"(?<=[.!?)]) (?=[A-Z\"])|(?<=[。！？])(?!$)")
_HALF_WIDTH = {
    ord(full): unicodedata.normalize("NFKC", full)
    for full in map(chr, range(0xFF01, 0xFF5F))
    if unicodedata.normalize("NFKC", full).isalnum() or full in "％．／－＋＝＆＊＃＠"
}
_SMALL_MARKS = str.maketrans("﹐﹑﹔﹕﹖﹗﹙﹚", "，、；：？！（）")
_MARK = re.compile(f"(?<=[{HAN}”）》]) ?([,;:?!.])(?: ?(?=[{HAN}“（《])|$)", re.MULTILINE)
_BLANK_AFTER_MARK = re.compile(f"(?<=[，。；：、！？]) +(?=[{HAN}“（《])")
_FULL_MARKS = {",": "，", ";": "；", ":": "：", "?": "？", "!": "！", ".": "。"}


@dataclass(frozen=True)
class Document:
    """One document, sentence pair or conversation.

    Attributes:
        group: What must not be split between training and validation: all documents of one
            package with the same group are held out together or not at all.
        record: The line of the output file.
        is_train_only: Never held out, because another package has the same text in other words.
    """

    group: str
    record: dict[str, Any]
    is_train_only: bool = False


@dataclass(frozen=True)
class Block:
    """A part of a page of documentation.

    Attributes:
        kind: `h1` to `h6`, `paragraph`, `item`, `term` or `code`.
        text: Plain text; empty for code.
    """

    kind: str
    text: str


CODE = Block("code", "")
"""Stands for code, tables, images and whatever else is not prose."""


def join_blocks(blocks: Iterable[Block]) -> str:
    """Joins blocks to a document: list items by line breaks, everything else by blank lines.

    A lead-in such as "for example:" is removed together with the code that it introduces, and so
    are repeated blocks and remainders such as the "or" between two pieces of code.
    """
    kept: list[Block] = []
    for block in blocks:
        if block.kind == "code":
            if kept and kept[-1].text.endswith((":", "：")):
                kept[-1] = Block(kept[-1].kind, _cut_last_sentence(kept[-1].text))
        elif block not in kept[-1:]:
            kept.append(block)
    joined, last = "", ""
    for block in kept:
        if len(block.text) < (3 if block.kind in ("paragraph", "item") else 1):
            continue
        if joined:
            joined += "\n" if block.kind == last == "item" else "\n\n"
        joined += ("- " if block.kind == "item" else "") + block.text
        last = block.kind
    return joined


def num_han(text: str) -> int:
    """Returns the number of Chinese characters in a text."""
    return len(_HAN.findall(text))


def to_half_width(text: str) -> str:
    """Converts full-width letters, digits and signs to ASCII, but not Chinese punctuation."""
    return text.translate(_HALF_WIDTH)


def to_chinese_marks(text: str) -> str:
    """Converts ASCII punctuation between Chinese characters to Chinese punctuation."""
    text = text.translate(_SMALL_MARKS)
    text = _MARK.sub(lambda match: _FULL_MARKS[match.group(1)], text)
    return _BLANK_AFTER_MARK.sub("", text)


def _cut_last_sentence(text: str) -> str:
    """Removes the last sentence."""
    ends = list(_SENTENCE_END.finditer(text))
    return text[: ends[-1].start()] if ends else ""


def tidy(text: str) -> str:
    """Normalizes to NFC and LF, removes invisible characters, collapses spaces and blank lines."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = _SPACES.sub(" ", _INVISIBLE.sub("", text.replace("\u2028", "\n")))
    text = "\n".join(line.strip() for line in text.split("\n"))
    return _BLANK_LINES.sub("\n\n", text).strip()


def tidy_code(text: str) -> str:
    """Like `tidy`, but keeps indentation and spaces within lines, for text that contains code."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = "\n".join(line.rstrip() for line in _INVISIBLE.sub("", text).split("\n"))
    return _BLANK_LINES.sub("\n\n", text).strip()


def tidy_line(text: str) -> str:
    """Like `tidy`, on one line."""
    return " ".join(tidy(text).split())
