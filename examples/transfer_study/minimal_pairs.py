"""Builds Chinese minimal pairs from held-out text.

A pair is a sentence of the text and the same sentence with one well-defined error, for the probe
``pairs`` of `megatron_chatflow.evaluation.probes`. Every error swaps neighbouring characters or one
character of a closed list, so that both sentences have the same number of characters:

- ``classifier``: the classifier after a number or demonstrative becomes one of another class of
  nouns.
- ``classifier_order``: a noun precedes its classifier.
- ``le``: the aspect particle le stands one character earlier, before or within its verb.
- ``de``: the particle de stands within the plural pronoun or noun before it.
- ``negation``: the negation stands within a verb that is no compound of verb and result.
- ``degree``: the adverb of degree follows its adjective.

CLiMP (Xiang et al., 2021) and SLING (Song et al., 2022) test similar errors on generated sentences.
The output depends on the text alone. It contains sentences of the text: do not publish it unless
the text's licence permits it.
"""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from megatron_chatflow.errors import ArgumentParser, UserError
from megatron_chatflow.files import write_atomically

MIN_CHARACTERS, MAX_CHARACTERS = 8, 50
MIN_HAN_SHARE = 0.7
_HAN = "\u4e00-\u9fff"
_SENTENCE = re.compile(r"[^。！？!?；\n]+[。！？!?；]?")
_NUMBER = "[一二两三四五六七八九十几数这那每某]"
# Each classifier with one for nouns of another class.
_OTHER_CLASSIFIER = {
    **{"位": "辆", "名": "座", "辆": "位", "座": "名", "匹": "篇", "朵": "位", "棵": "篇"},
    **{"幅": "匹", "篇": "辆", "首": "座", "条": "位", "件": "位", "张": "名", "项": "匹"},
    **{"家": "匹", "所": "匹", "艘": "位", "架": "名", "本": "位", "支": "位", "句": "匹"},
}
_NOUNS = (
    "问题 国家 地区 方面 城市 项目 企业 孩子 人 小时 部门 单位 故事 农民 工人 学生 老师 朋友 省市 "
    "公司 学校 房间 村子 家庭 月 工程 代表 电话 办法 机会 地方 女人 男人 工厂 民族 阶段 原因 "
    "同志 字 字母 演员 球队 产品 商店 饭店 酒店"
).split()
_VERBS = (
    "存在 需要 喜欢 同意 愿意 相信 符合 适应 允许 具备 属于 影响 重视 关心 支持 承认 反对 接受 "
    "主张 赞成 参加 使用 重要 满意 认识 习惯 推荐 建议 希望 适合 利于 理想"
).split()
_ADJECTIVES = (
    "重要 容易 困难 漂亮 舒服 干净 方便 清楚 明显 严重 复杂 简单 大 好 高 快 难 小 远".split()
)


def _swap_last(match: re.Match[str]) -> str:
    return match[1] + match[3] + match[2]


# The pattern of each error and the erroneous text of a match.
_ERRORS: dict[str, tuple[re.Pattern[str], Callable[[re.Match[str]], str]]] = {
    "classifier": (
        re.compile(
            f"(?<![第十百千万亿{''.join('一二两三四五六七八九')}])({_NUMBER})"
            f"([{''.join(_OTHER_CLASSIFIER)}])(?=[{_HAN}])(?![人数口次之字一的是在了体里来去])"
        ),
        lambda match: match[1] + _OTHER_CLASSIFIER[match[2]],
    ),
    "classifier_order": (
        re.compile(f"({_NUMBER})(个)({'|'.join(sorted(_NOUNS, key=len, reverse=True))})"),
        _swap_last,
    ),
    "le": (
        re.compile(
            f"()([{_HAN}])(?<![为除罢不得极好算对完])(了)(?![解不结如断却得事])(?=[{_HAN}])"
        ),
        _swap_last,
    ),
    "de": (re.compile(f"()(们)(的)(?=[{_HAN}])"), _swap_last),
    "negation": (
        re.compile(f"()(不)(?:(?={'|'.join(_VERBS)})([{_HAN}]))(?=[{_HAN}])"),
        _swap_last,
    ),
    "degree": (
        re.compile(
            f"()(很|非常|十分|更加|比较|相当)({'|'.join(_ADJECTIVES)})(?=[的，。！？；、]|$)"
        ),
        _swap_last,
    ),
}
KINDS = tuple(_ERRORS)


def sentences(text: str) -> Iterator[str]:
    """Yields the sentences of a text that are of medium length and mostly Chinese."""
    for match in _SENTENCE.finditer(text):
        sentence = match[0].strip()
        num_han = len(re.findall(f"[{_HAN}]", sentence))
        is_medium = MIN_CHARACTERS <= len(sentence) <= MAX_CHARACTERS
        if is_medium and num_han >= MIN_HAN_SHARE * len(sentence):
            yield sentence


def bad_sentence(sentence: str, kind: str) -> str | None:
    """Returns the sentence with an error of this kind; None if it has no place for one.

    A hash of the sentence selects one of several places.
    """
    pattern, write = _ERRORS[kind]
    places = list(pattern.finditer(sentence))
    if not places:
        return None
    match = places[_hash(kind, sentence) % len(places)]
    changed = sentence[: match.start()] + write(match) + sentence[match.end() :]
    return None if changed == sentence else changed


def minimal_pairs(texts: Iterable[str], max_per_kind: int) -> list[dict[str, str]]:
    """Returns the pairs of all texts, at most ``max_per_kind`` of each kind.

    A hash of the sentences selects them. A sentence is in one pair only.
    """
    found: dict[str, list[tuple[int, str, str]]] = {kind: [] for kind in KINDS}
    for sentence in sorted({one for text in texts for one in sentences(text)}):
        bad = {kind: bad_sentence(sentence, kind) for kind in KINDS}
        possible = [(kind, text) for kind, text in bad.items() if text is not None]
        if possible:
            # Rare kinds need their sentences most.
            kind, text = min(possible, key=lambda one: len(found[one[0]]))
            found[kind].append((_hash(sentence), sentence, text))
    return [
        {"good": good, "bad": text, "kind": kind}
        for kind, pairs in found.items()
        for _, good, text in sorted(pairs)[:max_per_kind]
    ]


def write_minimal_pairs(inputs: Sequence[Path], output: Path, max_per_kind: int) -> Counter[str]:
    """Writes the minimal pairs of JSON lines with ``text`` and returns their number by kind.

    Raises:
        UserError: An input cannot be read, or no sentence has a place for an error.
    """
    pairs = minimal_pairs((text for path in inputs for text in _texts(path)), max_per_kind)
    if not pairs:
        raise UserError(f"{inputs[0]}: has no sentence for a minimal pair; give Chinese text")
    lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs]
    write_atomically(output, "".join(lines))
    return Counter(pair["kind"] for pair in pairs)


def _texts(path: Path) -> Iterator[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield str(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}: line {number} is not a text ({error}); write an object with text"
                ) from None


def _hash(*texts: str) -> int:
    digest = hashlib.blake2b("\n".join(texts).encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def main() -> None:
    """Writes the pairs of files and prints their number by kind."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = ArgumentParser("Builds Chinese minimal pairs from held-out text.", "")
    parser.add_argument("inputs", type=Path, nargs="+", help="JSON Lines files with text")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument("--max-per-kind", type=int, default=100, help="default: %(default)s")
    args = parser.parse_args()
    for kind, count in write_minimal_pairs(args.inputs, args.output, args.max_per_kind).items():
        print(f"{kind}: {count}")


if __name__ == "__main__":
    main()
