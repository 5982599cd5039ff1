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

# Navigation, notices and advertisements of pages. English phrases occur in ordinary sentences, such
# as "I read more than you do.", so they must be whole lines, several of which may stand beside each
# other, or begin a line in the form that pages use. The same applies to Chinese links and buttons,
# but not to Chinese legal notices, which occur anywhere in a line.
_PHRASES = "|".join(
    (
        *("privacy policy", "cookie policy", r"terms (?:of use|of service|and conditions)"),
        *("all rights reserved", "read more", "share this(?: article| page| post| story)?"),
        *("back to top", "skip to (?:main )?content", "(?:log|sign) in", "sign up"),
    )
)
_BEGINNINGS = "|".join(
    (
        r"all rights reserved\b",
        r"(?:copyright\b|©|\(c\)).*\ball rights reserved\b",
        r"(?:we use|(?:this|our) (?:web ?)?site uses) cookies(?: (?:to|on|and|for|in)\b|\W*$)",
        r"(?:please )?enable javascript\b",
        r"(?:sign up for|subscribe to) our newsletter\b",
        r"click here to\b",
        r"log in to (?:comment|reply|post|continue|view|read)\b",
        r"read more\s*[:»›→>]",
        "网站地图|返回首页|返回顶部|上一篇|下一篇|上一页|下一页|阅读全文|閱讀全文|相关推荐|相关阅读",
        "热门推荐|猜你喜欢|分享到|点击下载|点击查看|立即下载|扫一扫|扫描二维码|关注公众号",
        "微信公众号|登录注册|登录后(?:可以?)?(?:查看|可见|阅读|下载|发表|评论|回复)|加载中",
        "举报电话|客服热线|友情链接",
    )
)
_NOTICES = (
    "版权所有|版權所有|侵权必究|转载请注明|轉載請註明|责任编辑|責任編輯|本文来源|本文來源|免责声明"
    "|免責聲明|ICP[备備證证]|公网安备|未[经經](?:授权|授權|许可|許可|允许|允許).{0,12}(?:转载|轉載)"
)
_BOILERPLATE = re.compile(
    rf"\W*(?:(?:(?:{_PHRASES})\b\W*)+$|{_BEGINNINGS})|.*?(?:{_NOTICES})", re.IGNORECASE
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


def without_boilerplate(text: str) -> tuple[str, list[str]]:
    """Removes short lines of navigation, notices and advertisements; returns also these lines."""
    lines = text.split("\n")
    removed = [line for line in lines if _is_boilerplate(line)]
    if not removed:
        return text, []
    return "\n".join(line for line in lines if not _is_boilerplate(line)).strip("\n"), removed


def _is_boilerplate(line: str) -> bool:
    return len(line) <= MAX_BOILERPLATE_CHARACTERS and _BOILERPLATE.match(line) is not None


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
