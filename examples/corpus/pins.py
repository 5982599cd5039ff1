"""The packages that carry the demo's text: the exact file, hash and licence of each.

Versions are exact because other releases of several packages ship without the files used here.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

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

PINS = tuple(
    Pin(**{**entry, "version": str(entry["version"]), "yields": tuple(entry["yields"])})
    for entry in yaml.safe_load(Path(__file__).with_name("packages.yaml").read_text("utf-8"))
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
