"""Splits texts of any script into words, identifies languages, and normalizes texts.

Chinese and other scripts without spaces are split into characters, which needs no dictionary: the
limits of the filters for such texts are set for characters, and n-grams of characters find the same
repetitions and duplicates as n-grams of words.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.languages import language_identifier as language_identifier

# Han, kana, Bopomofo, Thai, Lao, Myanmar and Khmer are written without spaces between words.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u312f\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af"
)
_LETTERS = f"[^\\W{_UNSPACED}]+"
_WORD = re.compile(f"[{_UNSPACED}]|{_LETTERS}(?:['\u2019]{_LETTERS})*|[^\\w\\s]")
_WORD_WITHOUT_PUNCTUATION = re.compile(f"[{_UNSPACED}]|{_LETTERS}(?:['\u2019]{_LETTERS})*")
_SENTENCE = re.compile(r"[^.!?。！？；…\n]+[.!?。！？；…]*[\"'”’」』）)]*|[^\n]")

# Short lines with one of these texts are navigation, notices or advertisements of a page.
BOILERPLATE_TEXTS = tuple(
    "版权所有 版權所有 未经授权 未經授權 未经许可 侵权必究 转载请注明 轉載請註明 责任编辑 責任編輯 "
    "本文来源 本文來源 免责声明 免責聲明 ICP备 ICP證 ICP证 公网安备 网站地图 返回首页 返回顶部 "
    "上一篇 下一篇 上一页 下一页 阅读全文 閱讀全文 相关推荐 相关阅读 热门推荐 猜你喜欢 分享到 "
    "点击下载 点击查看 立即下载 扫一扫 扫描二维码 关注公众号 微信公众号 登录注册 登录后 "
    "加载中 举报电话 客服热线 友情链接".split()
) + (
    *("all rights reserved", "privacy policy", "terms of use", "terms of service"),
    *("cookie policy", "uses cookies", "use cookies", "enable javascript", "share this"),
    *("sign up for our newsletter", "subscribe to our newsletter", "click here to"),
    *("log in to", "back to top", "skip to content", "read more"),
)
MAX_BOILERPLATE_CHARACTERS = 60


def words_of(text: str) -> list[str]:
    """Splits a text into words, punctuation marks, and characters of scripts without spaces."""
    return _WORD.findall(text)


def normalized_words_of(text: str) -> list[str]:
    """Splits a text into words in lower case, without punctuation marks."""
    return _WORD_WITHOUT_PUNCTUATION.findall(text.lower())


def sentence_spans_of(text: str) -> list[tuple[int, int]]:
    """Returns begin and end of each sentence, as offsets in characters."""
    return [match.span() for match in _SENTENCE.finditer(text) if match[0].strip()]


@cache
def _repeated_punctuation(limit: int) -> re.Pattern[str]:
    return re.compile(rf"([^\w\s])\1{{{limit},}}")


def limit_punctuation(text: str, limit: int) -> str:
    """Shortens runs of one punctuation mark to ``limit`` marks, such as `！！！！` to `！！`."""
    return _repeated_punctuation(limit).sub(lambda match: match[1] * limit, text)


def without_boilerplate(text: str) -> tuple[str, int]:
    """Removes short lines that contain one of `BOILERPLATE_TEXTS`; returns also their number."""
    lines = text.split("\n")
    kept = [line for line in lines if not _is_boilerplate(line)]
    if len(kept) == len(lines):
        return text, 0
    return "\n".join(kept).strip("\n"), len(lines) - len(kept)


def _is_boilerplate(line: str) -> bool:
    if len(line) > MAX_BOILERPLATE_CHARACTERS:
        return False
    lower = line.lower()
    return any(text in line or text in lower for text in BOILERPLATE_TEXTS)


@cache
def chinese_converter(script: Literal["simplified", "traditional"]) -> Callable[[str], str]:
    """Returns a function that converts Chinese text to a script and leaves other text unchanged.

    Raises:
        UserError: opencc is not installed.
    """
    try:
        import opencc
    except ImportError as error:
        raise UserError("--chinese needs opencc: pip install opencc") from error
    converter: Any = opencc.OpenCC("t2s" if script == "simplified" else "s2t")
    convert: Callable[[str], str] = converter.convert
    return convert
