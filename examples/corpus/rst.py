"""Converts reStructuredText with Sphinx's markup to plain prose, parsed by docutils.

Code, tables, images, comments and link targets are left out. References to other documents are
shown by the title of what they point to, so all documents are parsed before any is rendered.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from docutils import nodes
from docutils.core import publish_doctree
from docutils.parsers.rst import Directive, directives, roles

from examples.corpus.text import CODE, Block

_SETTINGS = {
    "_disable_config": True,
    "doctitle_xform": False,
    "docinfo_xform": False,
    "file_insertion_enabled": False,
    "raw_enabled": False,
    "report_level": 5,
    "halt_level": 5,
    "smart_quotes": False,
}
_LABELS = {
    "note": "Note: ",
    "warning": "Warning: ",
    "caution": "Caution: ",
    "important": "Important: ",
    "tip": "Tip: ",
    "hint": "Hint: ",
    "seealso": "See also: ",
    "versionadded": "New in version {}. ",
    "versionchanged": "Changed in version {}: ",
    "deprecated": "Deprecated since version {}: ",
}
_TITLED = {"admonition", "topic", "rubric"}
_SIGNED = {
    *("class", "method", "classmethod", "staticmethod", "attribute", "function", "exception"),
    *("data", "object", "envvar", "option", "django-admin-option", "describe"),
}
_BODY_ONLY = {"glossary", "setting", "fieldlookup", "templatefilter", "templatetag", "django-admin"}
_KEPT = {*_LABELS, *_TITLED, *_SIGNED, *_BODY_ONLY}
_CODE = {"code-block", "code", "console", "sourcecode", "literalinclude", "parsed-literal"}
_PREFIXES = {"rfc": "RFC ", "pep": "PEP ", "cve": "CVE-", "ticket": "#", "bpo": "bpo-"}
_WITH_TARGET = re.compile(r"(.*?)\s*<([^<>]*)>$", re.DOTALL)
_SKIPPED = (
    nodes.comment,
    nodes.footnote,
    nodes.citation,
    nodes.target,
    nodes.substitution_definition,
    nodes.system_message,
    nodes.image,
    nodes.transition,
    nodes.field_list,
)
_CODE_NODES = (nodes.literal_block, nodes.doctest_block, nodes.table, nodes.figure)


class _AnyOption(dict[str, Callable[[str], str]]):
    """Accepts every option of a directive, as Sphinx does for directives it does not know."""

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, name: str) -> Callable[[str], str]:
        return lambda value: value


class _AnyDirective(Directive):
    """Keeps a directive's name, argument and parsed content in a container."""

    optional_arguments = 1
    final_argument_whitespace = True
    has_content = True
    option_spec = _AnyOption()

    def run(self) -> list[nodes.Node]:
        kind = self.name.lower()
        if kind in _CODE:
            return [nodes.literal_block()]
        if kind not in _KEPT:
            return []
        argument = self.arguments[0] if self.arguments else ""
        children, _ = self.state.inline_text(argument, self.lineno)
        paragraph = nodes.paragraph("", "", *children)
        container = nodes.container(kind=kind, argument=argument, paragraph=paragraph)
        self.state.nested_parse(self.content, self.content_offset, container)
        return [container]


def _keep_role(role: str, source: str, text: str, *_: Any) -> tuple[list[Any], list[Any]]:
    """Keeps an interpreted text and its role until all titles are known."""
    name = role.rpartition(":")[2]
    return [nodes.inline(source, nodes.unescape(text), role=name)], []


def parse(source: str) -> nodes.document:
    """Parses a document, whatever roles and directives it uses."""
    for role in set(re.findall(r":([a-z][\w:.-]*):`", source)):
        roles.register_local_role(role, _keep_role)
    for directive in set(re.findall(r"^ *\.\. ([A-Za-z][\w:-]*)::", source, re.MULTILINE)):
        directives.register_directive(directive.lower(), _AnyDirective)
    return publish_doctree(source, settings_overrides=_SETTINGS)


def find_titles(name: str, document: nodes.document) -> dict[str, str]:
    """Returns what `:doc:` and `:ref:` references to a document show.

    Args:
        name: The document's path without suffix, such as `/topics/forms`.
        document: From `parse`.

    Returns:
        The title by `/path` for the document and by label for its sections.
    """
    titles: dict[str, str] = {}
    for section in document.findall(nodes.section):
        title = _inline(section[0], {}, name)
        titles.setdefault(name, title)
        for label in section["names"]:
            if document.nametypes.get(label):  # an explicit label, not the title itself
                titles[label] = title
    return titles


def to_blocks(document: nodes.document, titles: Mapping[str, str], name: str) -> Iterator[Block]:
    """Yields the blocks of a document.

    Args:
        document: From `parse`.
        titles: What references show, from `find_titles` over all documents.
        name: The document's own path, against which relative references are resolved.
    """
    for node in document.children:
        yield from _render(node, titles, name)


def _render(node: nodes.Node, titles: Mapping[str, str], name: str) -> Iterator[Block]:
    """Yields the blocks of a node, depth first."""
    if isinstance(node, _CODE_NODES):
        yield CODE
    elif isinstance(node, nodes.title):
        yield Block("heading", _inline(node, titles, name))
    elif isinstance(node, (nodes.paragraph, nodes.term, nodes.line)):
        kind = "term" if isinstance(node, nodes.term) else "paragraph"
        yield Block(kind, _inline(node, titles, name))
    elif isinstance(node, nodes.container) and "kind" in node:
        yield from _render_directive(node, titles, name)
    elif isinstance(node, (nodes.bullet_list, nodes.enumerated_list)):
        first = int(node.get("start", 1))
        for number, item in enumerate(node.children, first):
            is_numbered = node.get("enumtype") == "arabic"
            mark, kind = (f"{number}. ", "paragraph") if is_numbered else ("", "item")
            yield from _prefixed(mark, kind, _children(item, titles, name))
    elif isinstance(node, nodes.Element) and not isinstance(node, _SKIPPED):
        yield from _children(node, titles, name)


def _children(node: nodes.Node, titles: Mapping[str, str], name: str) -> Iterator[Block]:
    for child in node.children:
        yield from _render(child, titles, name)


def _render_directive(
    node: nodes.container, titles: Mapping[str, str], name: str
) -> Iterator[Block]:
    kind, argument = node["kind"], node["argument"]
    blocks = [*_children(node, titles, name)]
    if kind in _LABELS:
        label = _LABELS[kind].format(argument)
        if "{}" not in _LABELS[kind] and node["paragraph"]:
            blocks.insert(0, Block("paragraph", _inline(node["paragraph"], titles, name)))
        yield from _prefixed(label, "paragraph", iter(blocks))
        return
    if kind in _TITLED and argument:
        yield Block("paragraph", _inline(node["paragraph"], titles, name))
    elif kind in _SIGNED:
        for signature in argument.split("\n"):
            yield Block("term", signature.strip())
    yield from blocks


def _prefixed(mark: str, kind: str, blocks: Iterator[Block]) -> Iterator[Block]:
    """Puts a label or a list's mark before the first block, unless that has a mark itself."""
    for index, block in enumerate(blocks):
        if index == 0 and block.kind == "paragraph":
            yield Block(kind, mark + block.text)
        else:
            yield block


def _inline(node: nodes.Node, titles: Mapping[str, str], name: str) -> str:
    """Returns the text of a node without its inline markup."""
    parts: list[str] = []
    for child in node.children:
        if isinstance(child, nodes.footnote_reference):
            if parts:
                parts[-1] = parts[-1].rstrip()
        elif isinstance(child, nodes.inline) and "role" in child:
            parts.append(_show_role(child["role"], child.astext(), titles, name))
        elif isinstance(child, nodes.problematic):  # a reference whose target is not there
            parts.append(child.astext().strip("`_|*"))
        elif isinstance(child, (nodes.Text, nodes.literal)):
            parts.append(child.astext())
        elif not isinstance(child, (nodes.image, nodes.system_message)):
            parts.append(_inline(child, titles, name))
    return " ".join("".join(parts).split())


def _show_role(role: str, text: str, titles: Mapping[str, str], name: str) -> str:
    text = " ".join(text.split())
    if explicit := _WITH_TARGET.match(text):
        if explicit.group(1) and role not in _PREFIXES:
            return explicit.group(1)
        text = explicit.group(2)
    if role == "commit":
        return ""
    if role in _PREFIXES:
        number, _, anchor = text.partition("#")
        return _PREFIXES[role] + number + (" " + anchor.replace("-", " ") if anchor else "")
    if role == "doc":
        path = _absolute(name, text)
        return titles.get(path, path.rpartition("/")[2].replace("-", " "))
    if role == "ref":
        return titles.get(text.lower(), text.replace("-", " "))
    text = text.removeprefix("!")
    if text.startswith("~"):
        text = text.rpartition(".")[2].removeprefix("~")
    text = text.removeprefix(".")
    return text + "()" if role in ("meth", "func") and not text.endswith(")") else text


def _absolute(name: str, target: str) -> str:
    """Resolves a relative path of a document against another's."""
    steps: list[str] = [] if target.startswith("/") else name.split("/")[:-1]
    for step in target.split("/"):
        if step == "..":
            steps = steps[:-1]
        elif step != ".":
            steps.append(step)
    return "/".join(steps)
