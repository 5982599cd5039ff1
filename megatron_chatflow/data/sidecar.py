"""The JSON beside a dataset that says what made it, and where its loss mask lies.

In: the prefix `<prefix>_<key>_document`. Out: the sidecar's content, checked, or None.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_chatflow.errors import UserError

FORMAT_VERSION = 1
DOCUMENT_SUFFIX = "_document"
LOSS_MASK_SUFFIX = "_loss_mask"
HASHES_SUFFIX = ".hashes"


def sidecar_path(prefix: str | Path) -> Path:
    """`<prefix>.json`."""
    return Path(f"{prefix}.json")


def hashes_path(prefix: str | Path) -> Path:
    """`<prefix>.hashes`: what documents there are in a part of a job that drops duplicates."""
    return Path(f"{prefix}{HASHES_SUFFIX}")


def loss_mask_prefix(prefix: str | Path) -> Path:
    """The prefix of the loss mask of the documents at `<prefix>_<key>_document`."""
    return Path(f"{str(prefix).removesuffix(DOCUMENT_SUFFIX)}{LOSS_MASK_SUFFIX}")


def read_sidecar(prefix: str | Path) -> dict[str, Any] | None:
    """The sidecar of a dataset.

    Args:
        prefix: The dataset's, without `.bin` or `.idx`.

    Returns:
        Its content, or None if there is none, as for a dataset that Megatron-LM wrote.

    Raises:
        UserError: It is damaged, or of a later format.
    """
    path = sidecar_path(prefix)
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read: {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"damaged sidecar: {path}: {error}: preprocess the data again") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"unknown sidecar: {path}: format_version {version} instead of {FORMAT_VERSION}: "
            "read it with the version of this package that wrote it"
        )
    assert isinstance(content, dict)
    return content


def appends_bos(sidecar: Mapping[str, Any] | None) -> bool:
    """Whether a dataset's documents begin with BOS (`--append-bos`), as its sidecar says.

    Earlier versions did not record it, and stored none.
    """
    settings = None if sidecar is None else sidecar.get("settings")
    return isinstance(settings, Mapping) and settings.get("append_bos") is True


def appends_eod(sidecar: Mapping[str, Any] | None) -> bool:
    """Whether a dataset's documents end with EOD (`--append-eod`), as its sidecar says."""
    settings = None if sidecar is None else sidecar.get("settings")
    return isinstance(settings, Mapping) and settings.get("append_eod") is True


def settings_of(sidecar: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a dataset was made with; those that came later have their defaults."""
    return {"append_bos": False, **sidecar["settings"]}


def writes_bos(sidecar: Mapping[str, Any] | None) -> bool:
    """As `appends_bos`, or because the chat template of the user writes one."""
    template = None if sidecar is None else sidecar.get("template")
    jinja = template.get("jinja") if isinstance(template, Mapping) else None
    return appends_bos(sidecar) or (isinstance(jinja, str) and "bos_token" in jinja)


def sidecar_bytes(content: dict[str, Any]) -> bytes:
    """The file's content."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def sha256_of(path: Path) -> str:
    """The hash of a file, in hex, as a sidecar has it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
