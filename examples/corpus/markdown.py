"""Converts Markdown with MkDocs' extensions to blocks of plain prose, parsed by markdown-it-py.

Two translations of one page can be aligned by the kinds of their blocks.
"""

import re
from collections.abc import Iterator

from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.admon import admon_plugin
from mdit_py_plugins.front_matter import front_matter_plugin

from examples.corpus.text import CODE, HAN, Block, tidy_line

_PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
_PARSER.use(admon_plugin).use(front_matter_plugin)
# What MkDocs' extensions add to CommonMark: inclusions, attributes, emoji, and block markers.
_SNIPPET = re.compile(r"\{[!*].*?[!*]\}|\{%.*?%\}")
_ATTRIBUTES = re.compile(r"\{\s*[.#:][^}]*\}|\{target=[^}]*\}")
_EMOJI = re.compile(r":[a-z_]+[a-z]:")
_BLOCK_MARKER = re.compile(r"^/{3,}.*$|^:::.*$", re.MULTILINE)
_TAB = re.compile(r"={3} \"")
# Emphasis that CommonMark does not see, because Chinese punctuation stands beside the mark.
_EMPHASIS = re.compile(f"\\*\\*|(?<=[{HAN}])\\*|\\*(?=[{HAN}])")
_MARKED = re.compile(r"[\[\]`*_<>&{}\\~]|:[a-z_]+:")
_CODE_TOKENS = {"fence", "code_block", "html_block", "table_open"}


def parse_blocks(source: str) -> list[Block]:
    """Returns the blocks of a page; code, tables, images and raw HTML become `CODE`."""
    blocks: list[Block] = []
    for block in _blocks(_PARSER.parse(_BLOCK_MARKER.sub("", source))):
        if block.kind != "code":
            if block.text:
                blocks.append(block)
        elif blocks[-1:] != [CODE]:
            blocks.append(CODE)
    return blocks


def inline(text: str) -> str:
    """Returns a line of text without inline markup."""
    if not _MARKED.search(text):
        return tidy_line(text)
    return _show(_PARSER.parseInline(text)[0])


def _blocks(tokens: list[Token]) -> Iterator[Block]:
    kind, in_table, default_title = "paragraph", False, ""
    for token in tokens:
        if token.type in _CODE_TOKENS and not token.content.startswith("<!--"):
            in_table = in_table or token.type == "table_open"
            yield CODE
        elif token.type == "table_close":
            in_table = False
        elif token.type == "heading_open":
            kind = token.tag
        elif token.type == "list_item_open":
            kind = "item"
        elif token.type == "admonition_open":
            default_title = token.meta["tag"].title()
        elif token.type == "inline" and not in_table:
            # The content of a tab is code to CommonMark, so its label is left out as well.
            if token.content != default_title and not _TAB.match(token.content):
                yield Block(kind, _show(token))
            kind, default_title = "paragraph", ""


def _show(token: Token) -> str:
    """Returns the text of an inline token that a reader of the page sees."""
    parts = []
    for child in token.children or ():
        if child.type == "text":
            parts.append(_EMPHASIS.sub("", child.content))
        elif child.type == "code_inline":
            parts.append(child.content)
        elif child.type in ("softbreak", "hardbreak"):
            parts.append(" ")
    text = _EMOJI.sub("", _ATTRIBUTES.sub("", _SNIPPET.sub("", "".join(parts))))
    return tidy_line(text)
