"""The small files that travel with a model: tokenizer, chat template and configurations.

Every checkpoint carries them in its folder ``huggingface/``: those of the folder that its weights
came from, with the tokenizer and the chat template of the run. An export writes them back byte for
byte, except where their content has changed. Checkpoints of earlier versions have no such folder;
for them the files beside the run's tokenizer and the datasets' sidecars are read.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_chatflow.checkpoint.files import CARRIED, read_state
from megatron_chatflow.checkpoint.recorded_config import read_run_config
from megatron_chatflow.config.huggingface import architecture_of_config
from megatron_chatflow.convert.shape import (
    TORCH_NAMES,
    LlamaShape,
    huggingface_config,
    shape_of_config,
    shape_of_huggingface,
)
from megatron_chatflow.data.sidecar import read_sidecar
from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.templates import template_source
from megatron_chatflow.tokenizer import Tokenizer
from megatron_chatflow.tokenizer.chat_template import with_default_variables
from megatron_chatflow.tokenizer.small_files import (
    MODEL_CONFIG,
    SPECIAL_IDS,
    SmallFiles,
    complete_tokenizer,
    default_chat_template,
    json_bytes,
    read_model_files,
    read_tokenizer_files,
    replace_tokenizer,
    with_bos,
    with_chat_template,
    with_stop_tokens,
    without_tokenizer,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizerChoice:
    """The choice of an export's tokenizer."""

    model: Path | None = None  # the tokenizer's file or folder; None uses the run's
    # the name of a template, or a path for `template_source`; None uses the run's
    chat_template: str | None = None
    leave_out: bool = False  # whether to export without a tokenizer
    # how to fix a missing tokenizer, for error messages of the calling command
    advice: str = "give the run's tokenizer with --tokenizer-model"


def trained_chat_template(
    sources: Mapping[str, Iterable[str | Path]], own: str | None
) -> str | None:
    """Returns the Jinja source of a run's chat template, found in the sidecars of its datasets.

    Variables that the chats were rendered with are set at the beginning of the template, unless
    its caller sets them. Templates of chats take precedence over those of translations written as
    chats. Among several templates, the base model's (``own``) is used, or else the first one, with
    a warning. Returns None if the run has no chats.
    """
    chats: dict[str, dict[str, str]] = {}  # Jinja source to the template's name by source
    pairs: dict[str, dict[str, str]] = {}
    for source, prefixes in sources.items():
        for prefix in prefixes:
            record = (read_sidecar(prefix) or {}).get("template")
            if isinstance(record, dict) and isinstance(record.get("jinja"), str):
                of_format = pairs if record.get("format") == "pairs" else chats
                name = str(record.get("chat_template") or record.get("name"))
                variables = record.get("variables")
                variables = variables if isinstance(variables, dict) else {}
                name += f" with {json.dumps(variables, ensure_ascii=False)}" if variables else ""
                jinja = with_default_variables(record["jinja"], variables)
                of_format.setdefault(jinja, {})[source] = name
    templates = chats or pairs
    if not templates:
        return None
    chosen = own if own in templates else next(iter(templates))
    every = {jinja: {**pairs.get(jinja, {}), **chats.get(jinja, {})} for jinja in [*chats, *pairs]}
    if len(every) > 1:
        listing = [f"{next(iter(uses.values()))} in {', '.join(uses)}" for uses in every.values()]
        logger.warning(
            "the chats of the run use different templates (%s); exports use the template of %s. "
            "Preprocess all chats with the same template, or select one for the export with "
            "--chat-template",
            *("; ".join(listing), next(iter(every[chosen]))),
        )
    return chosen


def read_carried(checkpoint: Path) -> SmallFiles | None:
    """Reads the small files that a checkpoint carries; None if an earlier version saved it."""
    folder = checkpoint / CARRIED
    return read_model_files(folder) if folder.is_dir() and not folder.is_symlink() else None


def files_of_run(
    tokenizer: Tokenizer,
    sources: Mapping[str, Iterable[str | Path]],
    base: Path | None,
    *,
    is_huggingface: bool,
) -> SmallFiles:
    """Returns the small files that the checkpoints of a run carry.

    ``base`` is the folder that the weights come from, None for new weights, and ``sources`` are
    prefixes of the datasets by the source's name.
    """
    files: SmallFiles | None = None
    if base is not None:
        if is_huggingface:
            files = read_model_files(base)
        else:
            recorded = read_state(base).get("tokenizer") or {}
            is_same = recorded.get("sha256") == tokenizer.fingerprint
            files = files_of_checkpoint(base, tokenizer if is_same else None)
    files = replace_tokenizer(files or {}, tokenizer)
    template = trained_chat_template(sources, default_chat_template(files, base or Path()))
    return files if template is None else with_chat_template(files, template)


def files_of_checkpoint(checkpoint: Path, tokenizer: Tokenizer | None = None) -> SmallFiles:
    """Returns the small files of a checkpoint, including those of earlier versions."""
    files = read_carried(checkpoint)
    if files is not None:
        return files if tokenizer is None else replace_tokenizer(files, tokenizer)
    if tokenizer is None:
        return {}
    files = read_tokenizer_files(tokenizer)
    sources = read_run_config(checkpoint).data.sources
    template = trained_chat_template(
        {name: source.paths for name, source in sources.items()},
        default_chat_template(files, tokenizer.model_path.parent),
    )
    return files if template is None else with_chat_template(files, template)


def files_of_export(
    checkpoint: Path,
    choice: TokenizerChoice,
    tokenizer: Tokenizer | None,
    shape: LlamaShape,
    dtype: torch.dtype,
) -> SmallFiles:
    """Returns the small files of an exported folder."""
    files = files_of_checkpoint(checkpoint, tokenizer)
    if choice.leave_out:
        files = without_tokenizer(files)
    elif tokenizer is not None:
        files = complete_tokenizer(files, tokenizer)
        recorded = read_state(checkpoint).get("tokenizer") or {}
        if recorded.get("add_bos_token") is True:
            files = with_bos(files, tokenizer)
    if choice.chat_template is not None:
        files = with_chat_template(files, template_source(choice.chat_template))
    if tokenizer is not None and default_chat_template(files, checkpoint / CARRIED) is None:
        logger.warning(
            "no chat template found in the base model or in the run's data, so the export has "
            "none; a chat model needs one (convert_checkpoint.py export --chat-template)"
        )
    ids = {}
    if tokenizer is not None:
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        ids = {**ids, "pad_token_id": tokenizer.pad_id}
        ids = {name: token_id for name, token_id in ids.items() if token_id >= 0}
    files = with_stop_tokens(files, ids, tokenizer)
    files[MODEL_CONFIG] = _model_config(files, checkpoint / CARRIED, shape, dtype, ids)
    return files


def _model_config(
    files: Mapping[str, bytes],
    folder: Path,
    shape: LlamaShape,
    dtype: torch.dtype,
    ids: Mapping[str, int],
) -> bytes:
    """Returns config.json: the base model's, with updated values."""
    if MODEL_CONFIG not in files:
        special = {name: ids.get(name) for name in SPECIAL_IDS} if ids else {}
        return json_bytes(huggingface_config(shape, dtype, special))
    base: dict[str, Any] = json.loads(files[MODEL_CONFIG])
    special = {name: base[name] for name in SPECIAL_IDS if name in base}
    path = folder / MODEL_CONFIG
    try:
        before, architecture = shape_of_huggingface(folder), architecture_of_config(path, base)
    except UserError:
        return json_bytes(huggingface_config(shape, dtype, special))
    if not architecture.fits(shape):  # the run has other layers than its base model
        return json_bytes(huggingface_config(shape, dtype, special))
    old, new = (huggingface_config(of, dtype, {}, architecture) for of in (before, shape))
    changes = {name: value for name, value in new.items() if value != old[name]}
    if shape.rope_scaling_type == "yarn":  # some folders state the original length
        length = new["max_position_embeddings"]
        shape = replace(shape, max_position_embeddings=length)
        if base.get("max_position_embeddings") != length:
            changes["max_position_embeddings"] = length
    if {"rope_theta", "rope_scaling"} & changes.keys():
        base.pop("rope_parameters", None)  # transformers 5 holds both there
        changes |= {name: new[name] for name in ("rope_theta", "rope_scaling")}
    key = "dtype" if "dtype" in base else "torch_dtype"
    if base.get(key, "float32") != TORCH_NAMES[dtype]:
        changes[key] = TORCH_NAMES[dtype]
    if not changes:
        return files[MODEL_CONFIG]
    changed = {**base, **changes}
    try:
        is_same = shape_of_config(path, changed) == shape
    except UserError:
        is_same = False
    # A longer context, for example, may need another statement of the window.
    return json_bytes(
        changed if is_same else huggingface_config(shape, dtype, special, architecture)
    )
