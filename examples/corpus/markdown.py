"""Turns Markdown, with MkDocs' extensions, into plain blocks of prose.

In: a page. Out: `Block`s (headings, paragraphs, list items, places where code stood) whose text
has no markup left. Two translations of one page can be aligned by their kinds.
"""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass

from examples.corpus.text import cut_last_sentence, tidy_line

_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_FENCE = re.compile(r"\s*(`{3,}|~{3,})(.*)$")
_HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*$")
_ADMONITION = re.compile(r"(?:!!!|\?\?\?\+?)\s*[\w-]*\s*(?:\"([^\"]*)\")?\s*$|/{3,}.*$")
_TAB = re.compile(r"={3}\s+\"")
_ITEM = re.compile(r"(\s*)(?:[*+-]|\d+[.)])\s+")
_RULE = re.compile(r"(?:[-*_]\s*){3,}$")
_TABLE = re.compile(r"\s*\|.*\|\s*$")
_SNIPPET = re.compile(r"\{[!*].*?[!*]\}|\{%.*?%\}")
_IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)(?:\{[^}]*\})?")
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])+)\]\((?:[^()\s]|\([^)]*\))*(?:\s+\"[^\"]*\")?\)")
_REFERENCE = re.compile(r"\[([^\[\]]+)\]\[[^\]]*\]")
_AUTOLINK = re.compile(r"<(https?://[^>]+)>")
_ATTRIBUTES = re.compile(r"\{\s*[.#:][^}]*\}|\{target=[^}]*\}")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_CODE = re.compile(r"(`+)\s?(.+?)\s?\1(?!`)", re.DOTALL)
_STRONG = re.compile(r"(\*\*\*|\*\*|__)(?=\S)(.+?)(?<=\S)\1", re.DOTALL)
_EMPHASIS = re.compile(
    r"(?<![*\\])\*(?=[^\s*])([^*]+?)(?<=[^\s*])\*(?!\*)|(?<!\w)_(?=[^\s_])([^_]+?)(?<=[^\s_])_(?!\w)"
)
_ESCAPE = re.compile(r"\\([\\`*_{}\[\]()#+.!~|<>-])")
_SHORTCODE = re.compile(r":[a-z_]+[a-z]:")
_MIN_CHARACTERS = 3  # below it: "or", "...", what stood between two pieces of code
_MARKED = re.compile(r"[\[\]`*_<>&{}\\~]|:[a-z_]+:")
_HELD = re.compile("\x00(\\d+)\x00")


@dataclass(frozen=True)
class Block:
    """A piece of a page.

    Attributes:
        kind: `h1` to `h6`, `paragraph`, `item` or `code`.
        text: Plain text; empty for code.
    """

    kind: str
    text: str


def parse_blocks(source: str) -> list[Block]:
    """Splits a page into blocks; code, tables, images and raw HTML leave only `code` marks."""
    source = _COMMENT.sub("", _FRONT_MATTER.sub("", source.replace("\r\n", "\n")))
    blocks: list[Block] = []
    for kind, raw in _raw_blocks(source.expandtabs(4).split("\n")):
        if kind == "code":
            if not blocks or blocks[-1].kind != "code":
                blocks.append(Block("code", ""))
        elif text := inline(raw):
            blocks.append(Block(kind, text))
    return blocks


def to_plain_text(blocks: list[Block]) -> str:
    """Joins blocks as a document; a lead-in such as "for example:" goes with its code."""
    shown = ""
    last = ""
    for index, block in enumerate(blocks):
        text = block.text
        follows_code = index + 1 < len(blocks) and blocks[index + 1].kind == "code"
        if follows_code and text.endswith((":", "：")):
            text = cut_last_sentence(text)
        if len(text) < _MIN_CHARACTERS:
            continue
        if shown:
            shown += "\n" if block.kind == last == "item" else "\n\n"
        shown += ("- " if block.kind == "item" else "") + text
        last = block.kind
    return shown


def inline(text: str) -> str:
    """Removes inline markup: links, images, emphasis, code marks, HTML tags, entities."""
    if not _MARKED.search(text):
        return tidy_line(text)
    held: list[str] = []

    def hold(match: re.Match[str]) -> str:
        held.append(match.group(2))
        return f"\x00{len(held) - 1}\x00"

    text = _SNIPPET.sub("", text)
    text = _CODE.sub(hold, text)
    text = _IMAGE.sub("", text)
    text = _AUTOLINK.sub(r"\1", text)
    text = _LINK.sub(r"\1", _LINK.sub(r"\1", text))
    text = _REFERENCE.sub(r"\1", text)
    text = _ATTRIBUTES.sub("", text)
    text = _TAG.sub("", text)
    text = _STRONG.sub(r"\2", _STRONG.sub(r"\2", text))
    text = _EMPHASIS.sub(lambda match: match.group(1) or match.group(2), text)
    text = text.replace("~~", "")
    text = _SHORTCODE.sub("", _ESCAPE.sub(r"\1", html.unescape(text)))
    text = _HELD.sub(lambda match: held[int(match.group(1))], text)
    return tidy_line(text)


def _raw_blocks(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Yields (kind, source) of the blocks; text within admonitions is taken, within tabs not."""
    words: list[str] = []
    kind = "paragraph"
    index = 0
    while index < len(lines):
        line = lines[index]
        stripped = line.strip()
        skipped = _num_skipped(lines, index)
        heading = _HEADING.match(stripped)
        item = _ITEM.match(line)
        title = _ADMONITION.match(stripped)
        if words and (not stripped or skipped or heading or item or title):
            yield kind, " ".join(words)
            words, kind = [], "paragraph"
        if skipped:
            yield "code", ""
            index += skipped
            continue
        if heading:
            yield f"h{len(heading.group(1))}", heading.group(2)
        elif title:
            if title.group(1):
                yield "paragraph", title.group(1)
        elif item and not _RULE.match(stripped):
            kind, words = "item", [line[item.end() :].strip()]
        elif stripped and not _RULE.match(stripped):
            words.append(stripped.removeprefix("> ").removeprefix(">"))
        index += 1
    if words:
        yield kind, " ".join(words)


def _num_skipped(lines: list[str], index: int) -> int:
    """Returns how many lines from `index` on are code, a tab, a table or an HTML block."""
    line = lines[index]
    end = index + 1
    if fence := _FENCE.match(line):
        mark = fence.group(1)
        if mark in fence.group(2):
            return 0  # inline code that stands alone on its line
        while end < len(lines) and not lines[end].strip().startswith(mark):
            end += 1
        return end + 1 - index
    if _TAB.match(line.strip()):
        indent = len(line) - len(line.lstrip())
        while end < len(lines) and (
            not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) > indent
        ):
            end += 1
        return end - index
    if _TABLE.match(line):
        while end < len(lines) and _TABLE.match(lines[end]):
            end += 1
        return end - index
    if re.match(r"\s*</?(?:div|table|tr|td|style|script|img|iframe|details|summary)\b", line):
        return 1
    if _SNIPPET.fullmatch(line.strip()) or line.startswith(":::"):
        return 1
    return 0
