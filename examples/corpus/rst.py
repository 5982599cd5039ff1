"""Turns reStructuredText with Sphinx's markup into plain prose.

In: a document's source and the titles that its references mean. Out: paragraphs, headings and
list items as plain text; code, tables, images, comments and link targets are left out.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

from examples.corpus.text import cut_last_sentence

_DIRECTIVE = re.compile(r"\.\. (?:\|[^|]+\| )?([\w:+-]+)::(?:\s+(.*))?$")
_EXPLICIT = re.compile(r"\.\.(?:\s|$)")
_RULE = re.compile(r"([=\-~^\"'`*+#<>.:_])\1{2,}\s*$")
_TABLE_RULE = re.compile(r"=+(?: +=+)+\s*$")
_ITEM = re.compile(r"(?:[*+-]|(?:\d+|#|[a-zA-Z])[.)])(?:\s+|$)")
_OPTION = re.compile(r":[\w -]+:(?:\s|$)")
_LITERAL = re.compile(r"(``.+?``)", re.DOTALL)
_ROLE = re.compile(r":(?:[a-z]+:)?([a-z-]+):`([^`]+)`", re.DOTALL)
_WITH_TARGET = re.compile(r"(.*?)\s*<([^<>]*)>$", re.DOTALL)
_LINK = re.compile(r"`([^`<]+?)\s*<[^>`]*>`__?", re.DOTALL)
_REFERENCE = re.compile(r"`([^`]+)`__?|(?<![\w`])`([^`]+)`(?![\w`])", re.DOTALL)
_NAMED_REFERENCE = re.compile(r"\b([A-Za-z][\w.-]*[A-Za-z0-9])_(?=[\s.,;:)!?]|$)")
_FOOTNOTE = re.compile(r"\s?\[[\w#*]+\]_")
_STRONG = re.compile(r"(?<![\w*\\])\*\*(?=\S)(.+?)(?<=\S)\*\*(?![\w*])", re.DOTALL)
_EMPHASIS = re.compile(r"(?<![\w*\\])\*(?=[^\s*])(.+?)(?<=[^\s*\\])\*(?![\w*])", re.DOTALL)
_SUBSTITUTION = re.compile(r"(?<!\w)\|(\w[^|\n]*)\|(?:_{1,2})?")

_CODE = "code"  # stands where code was; told apart from the word by identity

_PROSE_LABELS = {
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
_WITH_SIGNATURE = {
    "class",
    "method",
    "classmethod",
    "staticmethod",
    "attribute",
    "function",
    "exception",
    "data",
    "object",
    "envvar",
    "option",
    "django-admin-option",
    "describe",
    "rubric",
    "admonition",
    "topic",
}
_TITLED = {"admonition", "topic", "rubric"}
_CODE_KINDS = {"code-block", "code", "console", "sourcecode", "literalinclude", "parsed-literal"}
_BODY_ONLY = {"glossary", "setting", "fieldlookup", "templatefilter", "templatetag", "django-admin"}
_PREFIXES = {"rfc": "RFC ", "pep": "PEP ", "cve": "CVE-", "ticket": "#", "bpo": "bpo-"}


def find_titles(name: str, source: str) -> dict[str, str]:
    """Finds what `:doc:` and `:ref:` references to a document show.

    Args:
        name: The document's path without suffix, such as `/topics/forms`.
        source: Its text.

    Returns:
        Title by `/path` for the document and by label for its sections.
    """
    titles: dict[str, str] = {}
    lines = source.split("\n")
    labels: list[str] = []
    for index, line in enumerate(lines[:-1]):
        if label := re.match(r"\.\. _`?([^:`]+)`?:\s*$", line):
            labels.append(" ".join(label.group(1).lower().split()))
        elif line.strip() and not line.startswith("..") and not _RULE.match(line):
            if _RULE.match(lines[index + 1]) and len(lines[index + 1].strip()) >= 3:
                title = inline(line.strip(), {}, name)
                titles.setdefault(name, title)
                titles |= dict.fromkeys(labels, title)
            if not line.startswith(" "):
                labels = []
    return titles


def to_plain_text(source: str, titles: Mapping[str, str], name: str) -> str:
    """Renders a document.

    Args:
        source: reStructuredText.
        titles: What references show, from `find_titles` over all documents.
        name: The document's own path, against which relative references are resolved.

    Returns:
        Blocks, separated by blank lines.
    """
    texts: list[str] = []
    for prefix, raw in _render(source.expandtabs(8).split("\n")):
        if raw is not _CODE:
            texts.append(prefix + inline(raw, titles, name).strip())
        elif texts and texts[-1].endswith(":"):
            texts[-1] = cut_last_sentence(texts[-1])
    return join_blocks(texts)


def join_blocks(blocks: Iterable[str]) -> str:
    """Joins blocks by blank lines, list items by line ends; empty and repeated ones go."""
    joined = ""
    last = ""
    for block in blocks:
        if not block or block == last:
            continue
        if joined:
            joined += "\n" if block.startswith("- ") and last.startswith("- ") else "\n\n"
        joined += block
        last = block
    return joined


def inline(text: str, titles: Mapping[str, str], name: str) -> str:
    """Removes inline markup: literals, roles, links, emphasis, footnotes."""

    def show(match: re.Match[str]) -> str:
        return _show_role(match.group(1), match.group(2), titles, name)

    parts = _LITERAL.split(text)
    for index, part in enumerate(parts):
        if index % 2:
            parts[index] = part[2:-2]
            continue
        part = _ROLE.sub(show, part)
        part = _LINK.sub(r"\1", part)
        part = _REFERENCE.sub(lambda match: match.group(1) or match.group(2), part)
        part = _NAMED_REFERENCE.sub(r"\1", part)
        part = _FOOTNOTE.sub("", part)
        part = _STRONG.sub(r"\1", part)
        part = _EMPHASIS.sub(r"\1", part)
        part = _SUBSTITUTION.sub(r"\1", part)
        parts[index] = re.sub(r"\\(.)", lambda match: match.group(1).strip(), part)
    return " ".join("".join(parts).split())


def _show_role(role: str, content: str, titles: Mapping[str, str], name: str) -> str:
    content = " ".join(content.split())
    if explicit := _WITH_TARGET.match(content):
        if explicit.group(1) and role not in _PREFIXES:
            return explicit.group(1)
        content = explicit.group(2)
    if role == "commit":
        return ""
    if role in _PREFIXES:
        number, _, anchor = content.partition("#")
        return _PREFIXES[role] + number + (" " + anchor.replace("-", " ") if anchor else "")
    if role == "doc":
        path = content if content.startswith("/") else _join(name, content)
        return titles.get(path, path.rpartition("/")[2].replace("-", " "))
    if role == "ref":
        return titles.get(content.lower(), content.replace("-", " "))
    content = content.removeprefix("!")
    if content.startswith("~"):
        content = content.rpartition(".")[2].removeprefix("~")
    content = content.removeprefix(".")
    if role in ("meth", "func") and not content.endswith(")"):
        content += "()"
    return content


def _join(name: str, relative: str) -> str:
    parts = name.split("/")[:-1]
    for step in relative.split("/"):
        if step == "..":
            parts = parts[:-1]
        elif step != ".":
            parts.append(step)
    return "/".join(parts)


def _render(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Yields (prefix, raw text) of every block of prose; recursive over indentation."""
    index = 0
    drops_literal = False
    while index < len(lines):
        line = lines[index]
        if not line.strip():
            index += 1
            continue
        indent = _indent(line)
        if indent:
            end = _end_of_indented(lines, index, 1)
            if drops_literal:
                yield "", _CODE
            else:
                yield from _render(_dedent(lines[index:end]))
            drops_literal, index = False, end
            continue
        drops_literal = False
        if _EXPLICIT.match(line):
            end = _end_of_indented(lines, index + 1, 1)
            yield from _directive(line, lines[index + 1 : end])
            index = end
        elif (end := _end_of_skipped(lines, index)) > index:
            yield "", _CODE
            index = end
        elif _ITEM.match(line):
            index, blocks = _item(lines, index)
            yield from blocks
        else:
            index, text, drops_literal = _paragraph(lines, index)
            yield "", text


def _directive(line: str, body: list[str]) -> Iterator[tuple[str, str]]:
    match = _DIRECTIVE.match(line)
    if match is None:
        return  # a comment, a link target or a footnote
    kind, argument = match.group(1).lower(), (match.group(2) or "").strip()
    signatures = [argument] if argument else []
    if kind in _WITH_SIGNATURE:
        num_more = next((i for i, text in enumerate(body) if not text.strip()), len(body))
        more = [text.strip() for text in body[:num_more]]
        signatures += [text for text in more if not _OPTION.match(text)]
        body = body[num_more:]
    body = _dedent(body)
    while body and _OPTION.match(body[0]):
        body = body[1:]
    if kind in _PROSE_LABELS:
        label = _PROSE_LABELS[kind].format(argument)
        if not kind.startswith(("version", "deprecated")) and argument:
            body = [argument, *body]
        for prefix, text in _render(body):
            yield (prefix if prefix else label), text
            label = ""
    elif kind in _WITH_SIGNATURE:
        yield from (("", text if kind in _TITLED else f"``{text}``") for text in signatures)
        yield from _render(body)
    elif kind in _BODY_ONLY:
        yield from _render(body)
    elif kind in _CODE_KINDS:
        yield "", _CODE


def _end_of_skipped(lines: list[str], index: int) -> int:
    """Returns where a rule, table or interactive session that begins here ends, else `index`."""
    line = lines[index]
    if line.startswith((">>>", "+-", "+=")):
        while index < len(lines) and lines[index].strip():
            index += 1
    elif _TABLE_RULE.match(line):
        end = index + 1
        while end < len(lines):
            is_last = end + 1 == len(lines) or not lines[end + 1].strip()
            end += 1
            if _TABLE_RULE.match(lines[end - 1]) and is_last:
                break
        return end
    elif _RULE.match(line) or line.startswith("__ "):
        return index + 1
    return index


def _item(lines: list[str], index: int) -> tuple[int, list[tuple[str, str]]]:
    marker = _ITEM.match(lines[index])
    assert marker is not None
    end = _end_of_indented(lines, index + 1, 1)
    first = lines[index][marker.end() :]
    blocks = list(_render([first, *_dedent(lines[index + 1 : end])]))
    number = marker.group().strip()
    prefix = f"{number} " if number[0].isdigit() else "- "
    if blocks:
        blocks[0] = (prefix + blocks[0][0], blocks[0][1])
    return end, blocks


def _paragraph(lines: list[str], index: int) -> tuple[int, str, bool]:
    """Returns the line after a paragraph, its text, and whether a literal block follows it."""
    words: list[str] = []
    while index < len(lines) and lines[index].strip() and not _indent(lines[index]):
        if words and (_EXPLICIT.match(lines[index]) or _RULE.match(lines[index])):
            break
        words.append(lines[index].strip())
        index += 1
        if _OPTION.match(words[0]) or (index < len(lines) and _RULE.match(lines[index])):
            break
    text = " ".join(words)
    if text.endswith("::"):
        return index, text[:-2].rstrip() + ("" if text in ("::", " ::") else ":"), True
    return index, text, False


def _end_of_indented(lines: list[str], index: int, indent: int) -> int:
    """Returns the end of the blank or indented lines from `index` on."""
    while index < len(lines) and (not lines[index].strip() or _indent(lines[index]) >= indent):
        index += 1
    return index


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _dedent(lines: list[str]) -> list[str]:
    """Removes the indentation of the least indented line, and blank lines at both ends."""
    indents = [_indent(line) for line in lines if line.strip()]
    if not indents:
        return []
    cut = min(indents)
    lines = [line[cut:] for line in lines]
    while not lines[0].strip():
        lines = lines[1:]
    while not lines[-1].strip():
        lines = lines[:-1]
    return lines
