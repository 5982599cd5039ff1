r"""Pair templates of the user's own, from a YAML file.

In: a file such as ::

    templates:                     # a hash of the pair chooses one
      - prompt: "Put this into {target_language}: {source}\n"
        response: "{target}"
      - text: "{source} = {target}"    # no prompt: loss on all of it

Out: `PairText`s, checked.
"""

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_chatflow.errors import UserError

NAMES = {"source", "target", "source_language", "target_language"}


@dataclass(frozen=True)
class PairText:
    """One template, with `{source}` and the other names in braces.

    Attributes:
        prompt: Without loss; empty for none.
        response: With loss; after a prompt it ends with the end-of-sequence token.
    """

    prompt: str
    response: str


def read_pair_templates(path: str | Path) -> tuple[PairText, ...]:
    """Reads a file of templates.

    Args:
        path: The YAML file.

    Raises:
        UserError: It cannot be read, or is not as described above.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read pair template: {path}: {error.strerror}: name plain, translate or a file"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"not YAML: {path}: {error}") from error
    entries = content.get("templates") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"no templates: {path}: has to have a list called templates")
    return tuple(_pair_text(entry, f"{path}: templates[{k}]") for k, entry in enumerate(entries))


def _pair_text(entry: Any, where: str) -> PairText:
    keys = set(entry) if isinstance(entry, dict) else set()
    if keys not in ({"text"}, {"prompt", "response"}):
        raise UserError(f"{where}: has to have either text, or prompt and response")
    for key in keys:
        try:
            names = {
                name for _, name, _, _ in string.Formatter().parse(entry[key]) if name is not None
            }
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}.{key}: {error}: write a brace of your own as two") from error
        if names - NAMES:
            unknown = ", ".join(sorted(names - NAMES))
            raise UserError(
                f"{where}.{key}: no such name: {unknown}: use {', '.join(sorted(NAMES))}"
            )
    if "{target}" not in entry.get("text", entry.get("response")):
        raise UserError(f"{where}: nothing to learn: name {{target}} in text or response")
    return PairText(entry.get("prompt", ""), entry.get("text", entry.get("response")))
