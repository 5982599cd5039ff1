"""Which tokenizer and chat template an exported folder carries.

In: a checkpoint, and what the user asked for. Out: Jinja source of the template that the run's
chats were written with, or None where the tokenizer brings its own.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from megatron_chatflow.checkpoint.recorded_config import RecordedConfig, read_run_config
from megatron_chatflow.corpus.templates import JINJA_TEMPLATES, template_source
from megatron_chatflow.data.sidecar import read_sidecar

DEFAULT = "chatflow"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizerChoice:
    """Which tokenizer goes into an export.

    Attributes:
        model: Its file or folder; None takes the one that the run's configuration names.
        chat_template: Name of a template, or a file of Jinja source; None takes the run's.
        leave_out: Export without any.
        advice: What to do where it is not found, as the command says it that was called.
    """

    model: Path | None = None
    chat_template: str | None = None
    leave_out: bool = False
    advice: str = "name the run's own with --tokenizer-model"


def chat_template(checkpoint: Path, tokenizer_model: Path, asked: str | None) -> str | None:
    """Chooses the template.

    Args:
        checkpoint: An ``iter_`` folder.
        tokenizer_model: The tokenizer's file.
        asked: A name in `JINJA_TEMPLATES`, a file of Jinja source, or None for the run's.

    Returns:
        Jinja source; None to keep what lies in the tokenizer's own configuration.

    Raises:
        UserError: Neither a name nor a file.
    """
    if asked is not None:
        return template_source(asked)
    trained = _template_of_corpus(read_run_config(checkpoint))
    if trained is not None:
        return trained
    return None if _has_template(tokenizer_model) else JINJA_TEMPLATES[DEFAULT]


def _template_of_corpus(config: RecordedConfig) -> str | None:
    """Jinja source of what the run's chats were written with, as far as their sidecars are here.

    Chats come before translations that were written as chats.
    """
    found: dict[str, dict[str, str]] = {"chat": {}, "pairs": {}}
    for source in config.data.sources.values():
        for prefix in source.paths:
            template = (read_sidecar(prefix) or {}).get("template")
            if isinstance(template, dict) and isinstance(template.get("jinja"), str):
                of_format = found.setdefault(str(template.get("format")), {})
                of_format[template["jinja"]] = str(template.get("name"))
    templates = found["chat"] or found["pairs"]
    if len(templates) > 1:
        logger.warning(
            "the run's chats have several templates, %s: the first goes along; "
            "--chat-template chooses another",
            ", ".join(templates.values()),
        )
    return next(iter(templates), None)


def _has_template(tokenizer_model: Path) -> bool:
    """Whether the tokenizer's folder has a template of its own that an export takes over."""
    folder = tokenizer_model if tokenizer_model.is_dir() else tokenizer_model.parent
    if not (folder / "tokenizer.json").is_file() or tokenizer_model.suffix == ".model":
        return False
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))
