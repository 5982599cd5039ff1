"""Sentence pairs: cloud API manuals, learners' sentences, benchmark cards, interface strings."""

import html
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from examples.corpus import markdown
from examples.corpus.archive import read_member, read_members
from examples.corpus.pairs import make_pair
from examples.corpus.text import Block, Document

_SDK_MODULE = r"tencentcloud/(\w+/v\d+)/(?:models|\w+_client)\.py"
_CLASS = re.compile(
    r'^class (\w+)\(AbstractModel\):\n    r?"""(.*?)"""\n+'
    r'    def __init__\(self\):\n(?:        r?"""(.*?)""")?',
    re.MULTILINE | re.DOTALL,
)
_FIELD = re.compile(r":param _?(\w+):(.*?)(?=\n\s*:type |\n\s*:param |\Z)", re.DOTALL)
_METHOD = re.compile(
    r'^    def (\w+)\(self, request\):\n        r?"""(.*?)\n\s*:param request:',
    re.MULTILINE | re.DOTALL,
)
_BREAK = re.compile(r"<br\s*/?>|</?(?:li|p|ul|ol|div|tr|h\d)\b[^<>]*>", re.IGNORECASE)
# Boilerplate at the end of thousands of descriptions, and class descriptions without content.
_NULL_NOTE_EN = re.compile(
    r"(?:Note: ?)?\s*(?:this|the) (?:field|parameter|value) (?:may|might|can) (?:also )?"
    r"return `?null`?,? ?(?:which )?(?:indicat\w+|mean\w*) (?:that )?no valid values? "
    r"(?:can|could|is|was|are|were)(?: be)? (?:obtained|found|available|returned)\.?",
    re.IGNORECASE,
)
_NULL_NOTE_ZH = re.compile(
    r"(?:注意：|注：|\*\*注意：?\*\*)?\s*此(?:字段|参数|值)可能(?:会)?返回\s*`?null`?，?"
    r"表示(?:取|获取)不到有效值。?",
    re.IGNORECASE,
)
_SAYS_NOTHING = re.compile(r"^\w+(?:请求参数|返回参数)结构体$|(?:request|response) structure\.?$")
_BENCHMARK = r"evalscope/benchmarks/_meta/[^/]+\.json"
_BENCHMARK_END = re.compile(r"^## (?:Properties|属性)\s*$", re.MULTILINE)
_MENU = r"jupyterlab_language_pack_zh_CN/locale/zh_CN/LC_MESSAGES/[^/]+\.json"
_PLACEHOLDER = re.compile(r"%\d|%[sd]|\{\w*\}|\$\{|_\(|&\w")


def cloud_manuals(archives: Mapping[str, Path]) -> Iterator[Document]:
    """Yields descriptions of classes, fields and methods that both editions of the SDK have.

    The group is the class or method, so that its fields stay on one side of the split.
    """
    english = _sdk_texts(archives["tencentcloud-sdk-python-intl-en"], None)
    modules = {key[0] for key in english}
    chinese = _sdk_texts(archives["tencentcloud-sdk-python"], modules)
    seen: set[tuple[str, str]] = set()
    for key, en in english.items():
        zh = chinese.get(key, "")
        if not zh or (en, zh) in seen:
            continue
        seen.add((en, zh))
        en, zh = clean_manual(en), clean_manual(zh)
        if _SAYS_NOTHING.search(en) or _SAYS_NOTHING.search(zh):
            continue
        if pair := make_pair(en, zh, min_han=8):
            yield Document(f"{key[0]}/{key[1]}", pair)


def clean_manual(text: str) -> str:
    """Removes markup and boilerplate from an SDK description. List items become lines."""
    text = html.unescape(_BREAK.sub("\n", text))
    text = _NULL_NOTE_ZH.sub("", _NULL_NOTE_EN.sub("", text))
    lines = (
        re.sub(r"^(?:[-*+•]\s+|#+\s+|-(?=[A-Za-z]))", "", line.strip()) for line in text.split("\n")
    )
    return "\n".join(filter(None, map(markdown.inline, lines))).replace(":.", ":")


def _sdk_texts(archive: Path, modules: set[str] | None) -> dict[tuple[str, str, str], str]:
    """Returns texts by (service and version, class or method, field or "")."""
    texts: dict[tuple[str, str, str], str] = {}
    for name, content in read_members(archive, _SDK_MODULE):
        module = name.removeprefix("tencentcloud/").rpartition("/")[0]
        if modules is not None and module not in modules:
            continue
        source = content.decode("utf-8", "replace")
        for class_name, description, fields in _CLASS.findall(source):
            texts[module, class_name, ""] = description
            for field, text in _FIELD.findall(fields):
                texts[module, class_name, field] = text
        for method, description in _METHOD.findall(source):
            texts[module, f"{method}()", ""] = description
    return texts


def learner_sentences(archives: Mapping[str, Path]) -> Iterator[Document]:
    """Yields everyday sentences for learners."""
    content = read_member(
        archives["hsk-sentences-audio"], "hsk_sentences_audio/data/sentences.json"
    )
    for entry in json.loads(content):
        if pair := make_pair(entry["translation"]["en"], entry["chinese"], min_han=2):
            yield Document(entry["id"], pair)


def benchmark_cards(archives: Mapping[str, Path]) -> Iterator[Document]:
    """Yields the blocks of benchmark descriptions that have the same number of blocks."""
    for name, content in read_members(archives["evalscope"], _BENCHMARK):
        readme: dict[str, Any] = json.loads(content).get("readme") or {}
        en, zh = (_card_lines(str(readme.get(language) or "")) for language in ("en", "zh"))
        if len(en) != len(zh):
            continue
        for left, right in zip(en, zh, strict=True):
            if left.kind == right.kind and (pair := make_pair(left.text, right.text, min_han=4)):
                yield Document(name, pair)


def _card_lines(readme: str) -> list[Block]:
    """Returns the blocks of a card above its table of properties."""
    return markdown.parse_blocks(_BENCHMARK_END.split(readme)[0])


def menus(archives: Mapping[str, Path]) -> Iterator[Document]:
    """Yields the strings of a user interface without placeholders."""
    for _, content in read_members(archives["jupyterlab-language-pack-zh-cn"], _MENU):
        for key, values in json.loads(content).items():
            en = key.rpartition("\x04")[2]  # a context may stand before the text, as in gettext
            if not en or not isinstance(values, list) or len(values) != 1:
                continue
            if _PLACEHOLDER.search(en) or _PLACEHOLDER.search(values[0]):
                continue
            if pair := make_pair(en, values[0], min_han=2):
                yield Document(en, pair)
