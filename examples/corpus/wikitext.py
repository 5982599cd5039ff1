"""Turns MediaWiki's wikitext into plain prose.

In: the source of an article. Out: its paragraphs, headings and list items; tables, references,
files, most templates and the sections after the article proper are left out.
"""

import html
import re
from collections.abc import Callable

from examples.corpus.text import tidy

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_REFERENCE = re.compile(r"<ref\b[^>/]*/>|<ref\b[^>]*>.*?</ref\s*>", re.DOTALL | re.IGNORECASE)
_REMOVED_TAGS = "gallery|math|timeline|source|syntaxhighlight|pre|score|imagemap|chem|hiero"
_REMOVED = re.compile(rf"<({_REMOVED_TAGS})\b[^>]*(?:/>|>.*?</\1\s*>)", re.DOTALL | re.IGNORECASE)
_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_TEMPLATE = re.compile(r"\{\{([^{}]*)\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_NOT_SHOWN = re.compile(
    r"\s*(?:file|image|category|media|[a-z]{2,3}(?:-[a-z]+)?)\s*:", re.IGNORECASE
)
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_EXTERNAL = re.compile(r"\[(?:https?:|ftp:)?//[^\s\]]+\s*([^\]]*)\]")
_QUOTES = re.compile(r"'{2,}")
_HEADING = re.compile(r"\s*(={2,6})\s*(.*?)\s*\1\s*$")
_LIST = re.compile(r"([*#:;]+)\s*")
_MAGIC = re.compile(r"__[A-Z]+__")
_APPENDICES = {
    "bibliography",
    "citations",
    "external links",
    "footnotes",
    "further reading",
    "gallery",
    "notes",
    "notes and references",
    "references",
    "see also",
    "sources",
    "works cited",
}
_LAST_ARGUMENT = {
    "lang",
    "nowrap",
    "nobr",
    "sic",
    "abbr",
    "transl",
    "small",
    "quote",
    "cquote",
    "blockquote",
    "quotation",
    "em",
    "strong",
    "smallcaps",
    "not a typo",
    "linktext",
}
_DASHES = {
    "ndash": "–",
    "spaced ndash": " – ",
    "snd": " – ",
    "mdash": "—",
    "spd": " – ",
    "'": "'",
    "'s": "'s",
    "=": "=",
    "!": "|",
    "·": "·",
    "nbsp": " ",
}
_STRAY = ("|", "!", "{|", "}}", "{{", "[[Image", "[[File", "thumb")
_UNBALANCED = re.compile(r"\[\[|\]\]|\{\{|\}\}")
_HOLLOW = re.compile(r"\(\s*(?:[,;:]\s*|or\s+|and\s+)*\)|\[\s*\]")
_HOLLOW_START = re.compile(r"\(\s*(?:[;,:]\s*)+")
_HOLLOW_END = re.compile(r"(?:\s*[;,:])+\s*\)")
_SPACE_BEFORE = re.compile(r" +([,.;:!?)])")


def to_plain_text(source: str) -> str:
    """Renders an article.

    Args:
        source: Wikitext, entities of the surrounding XML already resolved.

    Returns:
        Paragraphs separated by blank lines.
    """
    text = _COMMENT.sub("", source)
    text = _REFERENCE.sub("", text)
    text = _REMOVED.sub("", text)
    text = _BREAK.sub(" ", text)
    text = _innermost_first(_TEMPLATE, _show_template, text)
    text = _innermost_first(_TABLE, lambda _: "", text)
    text = _EXTERNAL.sub(r"\1", text)
    text = _innermost_first(_LINK, _show_link, text)
    text = _MAGIC.sub("", _TAG.sub("", _QUOTES.sub("", text)))
    return tidy(repair(_show_lines(html.unescape(text))))


def is_redirect(source: str) -> bool:
    """Tells whether an article only points to another."""
    return source.lstrip().lower().startswith("#redirect")


def _innermost_first(
    pattern: re.Pattern[str], show: Callable[[re.Match[str]], str], text: str
) -> str:
    for _ in range(20):
        text, num_replaced = pattern.subn(show, text)
        if not num_replaced:
            break
    return text


def _show_template(match: re.Match[str]) -> str:
    parts = [part.strip() for part in match.group(1).split("|")]
    name = parts[0].lower()
    values = [part for part in parts[1:] if not re.match(r"[\w -]+=", part)]
    if name in _DASHES:
        return _DASHES[name]
    if not values:
        return ""
    if name in _LAST_ARGUMENT:
        return values[0] if name in ("abbr", "sic", "quote", "cquote", "quotation") else values[-1]
    if name in ("convert", "cvt") and len(values) >= 2:
        if values[1] in ("to", "-", "–", "by", "and") and len(values) >= 4:
            return f"{values[0]} {values[1]} {values[2]} {values[3]}"
        return f"{values[0]} {values[1]}"
    if name in ("as of", "circa", "c."):
        return ("As of " if name == "as of" else "c. ") + values[0]
    if name in ("val", "gaps", "formatnum"):
        return "".join(values)
    if name in ("frac", "sfrac") and len(values) == 2:
        return f"{values[0]}/{values[1]}"
    if name == "isbn":
        return f"ISBN {values[0]}"
    return ""


def _show_link(match: re.Match[str]) -> str:
    target, _, label = match.group(1).partition("|")
    if _NOT_SHOWN.match(target):
        return ""
    return label.rpartition("|")[2] if label else target.removeprefix(":").partition("#")[0]


def _show_lines(text: str) -> str:
    """Turns headings and list marks to plain lines; stops taking text in an appendix."""
    shown: list[str] = []
    skipped_level = 0
    for line in text.split("\n"):
        if heading := _HEADING.match(line):
            level, title = len(heading.group(1)), heading.group(2)
            if skipped_level and level > skipped_level:
                continue
            skipped_level = level if title.lower() in _APPENDICES else 0
            if not skipped_level:
                shown += ["", title, ""]
        elif not skipped_level:
            if mark := _LIST.match(line):
                bullet = "" if mark.group(1)[-1] in ":;" else "- "
                line = bullet + line[mark.end() :]
                shown.append(line if line != "- " else "")
            elif not line.lstrip().startswith(_STRAY):
                shown += [line, ""] if line.strip() else [""]
    return "\n".join(shown)


def repair(text: str) -> str:
    """Closes the holes that templates leave: empty parentheses, blanks before commas."""
    text = _UNBALANCED.sub("", text)
    for _ in range(2):
        text = _HOLLOW.sub("", text)
        text = _HOLLOW_END.sub(")", _HOLLOW_START.sub("(", text))
    return _SPACE_BEFORE.sub(r"\1", text.replace("( ", "("))
