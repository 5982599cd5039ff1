"""What every extractor shares: the document record and the tidying of plain text.

In: text as found. Out: the same text without encoding debris, and `Document`s.
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Character ranges of Chinese characters, for use inside a regular expression's class."""

_HAN = re.compile(f"[{HAN}]")
# Soft hyphens, zero-width characters, direction marks, byte-order marks, and replacement
# characters, as well as control characters other than tab and newline.
_DEBRIS = re.compile(
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


def num_han(text: str) -> int:
    """Returns how many Chinese characters a text has."""
    return len(_HAN.findall(text))


def to_half_width(text: str) -> str:
    """Turns full-width letters, digits and signs to ASCII; Chinese punctuation stays."""
    return text.translate(_HALF_WIDTH)


def to_chinese_marks(text: str) -> str:
    """Turns ASCII punctuation between Chinese characters to the Chinese marks."""
    text = text.translate(_SMALL_MARKS)
    text = _MARK.sub(lambda match: _FULL_MARKS[match.group(1)], text)
    return _BLANK_AFTER_MARK.sub("", text)


def cut_last_sentence(text: str) -> str:
    """Removes the last sentence: "For example:" makes no sense without the example."""
    ends = list(_SENTENCE_END.finditer(text))
    return text[: ends[-1].start()] if ends else ""


def tidy(text: str) -> str:
    """Normalises line ends, composes accents, removes debris, collapses blanks and blank lines."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = _SPACES.sub(" ", _DEBRIS.sub("", text.replace("\u2028", "\n")))
    text = "\n".join(line.strip() for line in text.split("\n"))
    return _BLANK_LINES.sub("\n\n", text).strip()


def tidy_code(text: str) -> str:
    """`tidy` for text that may have code in it: blanks within and before lines stay."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = "\n".join(line.rstrip() for line in _DEBRIS.sub("", text).split("\n"))
    return _BLANK_LINES.sub("\n\n", text).strip()


def tidy_line(text: str) -> str:
    """`tidy`, and everything on one line."""
    return " ".join(tidy(text).split())
