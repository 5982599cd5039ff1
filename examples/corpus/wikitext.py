"""Converts MediaWiki's wikitext to plain prose, parsed by mwparserfromhell.

Tables, references, files, most templates and the sections after the article proper are left out.
"""

import re

from mwparserfromhell import nodes, parse
from mwparserfromhell.wikicode import Wikicode

from examples.corpus.text import Block, join_blocks, tidy

_REMOVED_TAGS = frozenset(
    "ref references gallery math timeline source syntaxhighlight pre score imagemap chem hiero "
    "table tr td th".split()
)
_NOT_SHOWN = re.compile(
    r"\s*(?:file|image|category|media|[a-z]{2,3}(?:-[a-z]+)?)\s*:", re.IGNORECASE
)
_APPENDICES = frozenset(
    [
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
    ]
)
_FIRST_ARGUMENT = frozenset("abbr sic quote cquote quotation".split())
_LAST_ARGUMENT = frozenset(
    "lang nowrap nobr transl small blockquote em strong smallcaps linktext".split()
)
_SYMBOLS = {
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
# What the parser leaves as text where the article's own markup is not balanced.
_UNBALANCED = re.compile(r"\[\[|\]\]|\{\{|\}\}|'{2,}|__[A-Z]+__|</?[a-zA-Z][^<>]*>|<!--|-->")
_STRAY = ("|", "!", "{|", "}}", "{{", "[[Image", "[[File", "thumb")
_HEADING = re.compile(r"(={2,6})\s*(.*?)\s*\1")
_ITEM = re.compile(r"(?:- )+")
_HOLLOW = re.compile(r"\(\s*(?:[,;:]\s*|or\s+|and\s+)*\)|\[\s*\]")
_HOLLOW_START = re.compile(r"\(\s*(?:[;,:]\s*)+")
_HOLLOW_END = re.compile(r"(?:\s*[;,:])+\s*\)")
_SPACE_BEFORE = re.compile(r" +([,.;:!?)])")


def to_plain_text(source: str) -> str:
    """Renders an article.

    Args:
        source: Wikitext, with the entities of the surrounding XML resolved.

    Returns:
        Paragraphs separated by blank lines.
    """
    blocks: list[Block] = []
    skipped_level = 0
    for line in filter(None, map(str.strip, _show(parse(source)).split("\n"))):
        if heading := _HEADING.fullmatch(line):
            level, title = len(heading[1]), heading[2]
            if skipped_level and level > skipped_level:
                continue
            skipped_level = level if title.lower() in _APPENDICES else 0
            if not skipped_level:
                blocks.append(Block("heading", title))
        elif skipped_level or line.startswith(_STRAY):
            continue
        elif item := _ITEM.match(line):
            blocks.append(Block("item", line[item.end() :]))
        else:
            blocks.append(Block("paragraph", line))
    return tidy(repair(join_blocks(blocks)))


def is_redirect(source: str) -> bool:
    """Returns whether an article only points to another."""
    return source.lstrip().lower().startswith("#redirect")


def repair(text: str) -> str:
    """Removes unbalanced markup, and the empty parentheses that removed templates leave."""
    text = _UNBALANCED.sub("", text)
    for _ in range(2):
        text = _HOLLOW.sub("", text)
        text = _HOLLOW_END.sub(")", _HOLLOW_START.sub("(", text))
    return _SPACE_BEFORE.sub(r"\1", text.replace("( ", "("))


def _show(code: Wikicode) -> str:
    return "".join(map(_show_node, code.nodes))


def _show_node(node: nodes.Node) -> str:
    """Returns the text that a reader of the page sees."""
    if isinstance(node, nodes.Text):
        return str(node.value)
    if isinstance(node, nodes.HTMLEntity):
        return str(node.normalize())
    if isinstance(node, nodes.Template):
        return _show_template(node)
    if isinstance(node, nodes.Wikilink):
        if _NOT_SHOWN.match(str(node.title)):
            return ""
        if node.text is not None:
            return _show(node.text).rpartition("|")[2]
        return _show(node.title).removeprefix(":").partition("#")[0]
    if isinstance(node, nodes.ExternalLink):
        return _show(node.title) if node.title is not None else "" if node.brackets else str(node)
    if isinstance(node, nodes.Tag):
        return _show_tag(node)
    if isinstance(node, nodes.Heading):  # stays marked, because tags that are not closed hold some
        return f"{'=' * node.level} {_show(node.title).strip()} {'=' * node.level}"
    return ""  # comments, arguments of templates


def _show_tag(tag: nodes.Tag) -> str:
    name = str(tag.tag).strip().lower()
    if name in _REMOVED_TAGS:
        return ""
    if name == "li" and tag.wiki_markup:
        return "- "
    if name == "br":
        return " "
    return _show(tag.contents) if tag.contents is not None else ""


def _show_template(template: nodes.Template) -> str:
    """Returns what the templates within sentences show; others are left out."""
    name = str(template.name).strip().lower()
    values = [_show(param.value).strip() for param in template.params if not param.showkey]
    if name in _SYMBOLS:
        return _SYMBOLS[name]
    if not values:
        return ""
    if name in _FIRST_ARGUMENT:
        return values[0]
    if name in _LAST_ARGUMENT:
        return values[-1]
    if name in ("convert", "cvt") and len(values) >= 2:
        is_range = values[1] in ("to", "-", "–", "by", "and") and len(values) >= 4
        return " ".join(values[: 4 if is_range else 2])
    if name in ("as of", "circa", "c."):
        return ("As of " if name == "as of" else "c. ") + values[0]
    if name in ("val", "gaps", "formatnum"):
        return "".join(values)
    if name in ("frac", "sfrac") and len(values) == 2:
        return "/".join(values)
    return f"ISBN {values[0]}" if name == "isbn" else ""
