"""Which tokenizer and chat template an exported folder carries."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_chatflow.data.sidecar import read_sidecar

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizerChoice:
    """Which tokenizer goes into an export.

    Attributes:
        model: Its file or folder; None takes the run's own.
        chat_template: Name of a template, or a path that `read_chat_template` takes; None takes the
            run's.
        leave_out: Export without any.
        advice: What to do where it is not found, as the command says it that was called.
    """

    model: Path | None = None
    chat_template: str | None = None
    leave_out: bool = False
    advice: str = "name the run's own with --tokenizer-model"


def trained_chat_template(
    sources: Mapping[str, Iterable[str | Path]], own: str | None
) -> str | None:
    """Jinja source of what a run's chats are written with, as far as their sidecars are here.

    Chats count before translations that are written as chats. Of several templates the base
    model's own is taken, else the first, with a warning.

    Args:
        sources: Prefixes of datasets by the source's name.
        own: The base model's template; None if it has none.

    Returns:
        None where no chats are trained.
    """
    chats: dict[str, dict[str, str]] = {}  # Jinja source to the template's name by source
    pairs: dict[str, dict[str, str]] = {}
    for source, prefixes in sources.items():
        for prefix in prefixes:
            record = (read_sidecar(prefix) or {}).get("template")
            if isinstance(record, dict) and isinstance(record.get("jinja"), str):
                of_format = pairs if record.get("format") == "pairs" else chats
                name = str(record.get("chat_template") or record.get("name"))
                of_format.setdefault(record["jinja"], {})[source] = name
    templates = chats or pairs
    if not templates:
        return None
    chosen = own if own in templates else next(iter(templates))
    every = {jinja: {**pairs.get(jinja, {}), **chats.get(jinja, {})} for jinja in [*chats, *pairs]}
    if len(every) > 1:
        listing = [f"{next(iter(uses.values()))} in {', '.join(uses)}" for uses in every.values()]
        logger.warning(
            "the run's chats are written in different templates (%s): exports get the one of %s; "
            "preprocess all chats with one template, or name another to the export as "
            "--chat-template",
            *("; ".join(listing), next(iter(every[chosen]))),
        )
    return chosen
