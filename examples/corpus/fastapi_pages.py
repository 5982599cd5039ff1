"""The documentation pages of fastapi: English text, Chinese text, and pairs of the two.

Pairs come from sections of translated pages whose blocks are of the same kinds. All documents
carry the page as their group, so that a page is held out of every source or of none.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from examples.corpus.archive import read_members
from examples.corpus.markdown import parse_blocks
from examples.corpus.pairs import make_pair
from examples.corpus.text import Block, Document, join_blocks, num_han, to_chinese_marks

_PAGE = r"docs/(en|zh)/docs/(.+)\.md"
# Lists of people, links and changes, and templates: not prose.
_NOT_PROSE = {"release-notes", "fastapi-people", "external-links", "newsletter"}
_MIN_ENGLISH, _MIN_CHINESE = 200, 60


def english_pages(archives: Mapping[str, Path]) -> Iterator[Document]:
    """Yields the English pages as {"text"}; those with a translation come first."""
    pages = _read_pages(archives["fastapi"])
    english, chinese = pages["en"], pages["zh"]
    for page in sorted(english, key=lambda page: (page not in chinese, page)):
        text = join_blocks(english[page])
        if len(text) >= _MIN_ENGLISH:
            yield Document(page, {"text": text})


def chinese_pages(archives: Mapping[str, Path]) -> Iterator[Document]:
    """Yields the Chinese pages as {"text"}."""
    for page, blocks in sorted(_read_pages(archives["fastapi"])["zh"].items()):
        text = to_chinese_marks(join_blocks(blocks))
        if num_han(text) >= max(_MIN_CHINESE, len(text) // 5):
            yield Document(page, {"text": text})


def page_pairs(archives: Mapping[str, Path]) -> Iterator[Document]:
    """Yields pairs as {"en", "zh"} from sections with the same kinds of blocks."""
    pages = _read_pages(archives["fastapi"])
    for page in sorted(pages["en"].keys() & pages["zh"].keys()):
        for en, zh in align_pages(pages["en"][page], pages["zh"][page]):
            if pair := make_pair(en, zh, min_han=4):
                yield Document(page, pair)


def align_pages(english: list[Block], chinese: list[Block]) -> Iterator[tuple[str, str]]:
    """Pairs the blocks of two translations of a page.

    Args:
        english: Blocks of the English page.
        chinese: Blocks of the Chinese page.

    Yields:
        Texts of blocks at the same position of matching sections. Sections match if their
        sequences of kinds are equal.
    """
    left, right = _sections(english), _sections(chinese)
    outlines = [[tuple(block.kind for block in part) for part in side] for side in (left, right)]
    matcher = difflib.SequenceMatcher(None, outlines[0], outlines[1], autojunk=False)
    for begin_left, begin_right, size in matcher.get_matching_blocks():
        for offset in range(size):
            for en, zh in zip(left[begin_left + offset], right[begin_right + offset], strict=True):
                if en.text and zh.text:
                    yield en.text, zh.text


def _sections(blocks: list[Block]) -> list[list[Block]]:
    sections: list[list[Block]] = [[]]
    for block in blocks:
        if block.kind.startswith("h"):
            sections.append([])
        sections[-1].append(block)
    return [section for section in sections if section]


def _read_pages(archive: Path) -> dict[str, dict[str, list[Block]]]:
    """Returns blocks by language and page."""
    pages: dict[str, dict[str, list[Block]]] = {"en": {}, "zh": {}}
    for name, content in read_members(archive, _PAGE):
        match = re.match(_PAGE, name)
        if match and match.group(2) not in _NOT_PROSE:
            pages[match.group(1)][match.group(2)] = parse_blocks(content.decode("utf-8"))
    return pages
