"""The sidecar: a JSON file next to a dataset that records its origin, counts and file hashes.

`read_sidecar` is the only reader. It validates the whole file against the schema below, so that
training, merging, inspection, planning and export can rely on the types and ranges of the values.
Keys that are not in the schema are kept unchanged, because a later version may have written them.
"""

import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from pydantic_core import from_json
from typing_extensions import NotRequired, TypedDict

from megatron_chatflow.config.fields import shorten
from megatron_chatflow.errors import UserError

FORMAT_VERSION = 1
DOCUMENT_SUFFIX = "_document"
LOSS_MASK_SUFFIX = "_loss_mask"
HASHES_SUFFIX = ".hashes"


MAX_SIDECAR_BYTES = 1 << 26
"""Maximum size of a sidecar. A sidecar has about 100 bytes per input file, and its parsed contents
use about 25 times its size in memory."""

_DEFAULTS: dict[str, Any] = {"settings": {}, "repaired": {}, "num_bad_lines": 0}
"""Values of keys that sidecars of the first version do not have."""


def _check_part(part: list[int]) -> list[int]:
    if part[0] >= part[1]:
        raise ValueError(f"part {part[0]} of {part[1]}")
    return part


_OPEN = ConfigDict(strict=True, extra="allow")
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_BlockHash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
_Part = Annotated[list[_Count], Field(min_length=2, max_length=2), AfterValidator(_check_part)]


@with_config(_OPEN)
class _Tokenizer(TypedDict):
    type: str
    sha256: _Digest
    vocab_size: Annotated[int, Field(ge=1, lt=2**31)]


@with_config(_OPEN)
class _Input(TypedDict):
    name: str
    num_bytes: _Count


@with_config(_OPEN)
class _Template(TypedDict):
    format: NotRequired[str]
    name: NotRequired[str]
    loss: NotRequired[str]
    direction: NotRequired[str]
    texts: NotRequired[list[dict[str, str]]]
    chat_template: NotRequired[str]
    jinja: NotRequired[str]
    sha256: NotRequired[_Digest]
    variables: NotRequired[dict[str, bool | int | float | str | None]]


@with_config(_OPEN)
class _Settings(TypedDict):
    append_bos: NotRequired[bool]
    append_eod: NotRequired[bool]
    max_tokens: NotRequired[_Count | None]
    dedup: NotRequired[bool]


@with_config(_OPEN)
class _Hashes(TypedDict):
    bin: _Digest
    idx: _Digest
    loss_mask_bin: NotRequired[_Digest]
    hashes: NotRequired[_Digest]


@with_config(_OPEN)
class _BlockHashes(TypedDict):
    bin: _BlockHash
    idx: _BlockHash
    loss_mask_bin: NotRequired[_BlockHash]


@with_config(_OPEN)
class _Sidecar(TypedDict):
    tool_version: str
    tokenizer: _Tokenizer
    template: NotRequired[_Template]
    settings: NotRequired[_Settings]
    inputs: list[_Input]
    num_documents: _Count
    num_tokens: _Count
    num_loss_tokens: _Count
    num_text_bytes: _Count
    dropped: dict[str, _Count]
    repaired: NotRequired[dict[str, _Count]]
    num_bad_lines: NotRequired[_Count]
    max_bad_lines: NotRequired[_Count]
    max_dropped_share: NotRequired[Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    sha256: _Hashes
    block_hash: NotRequired[_BlockHashes]
    part: NotRequired[_Part]


_SCHEMA = TypeAdapter(_Sidecar)


def sidecar_path(prefix: str | Path) -> Path:
    """Returns `<prefix>.json`."""
    return Path(f"{prefix}.json")


def hashes_path(prefix: str | Path) -> Path:
    """Returns `<prefix>.hashes`, the document hashes of one partition of a deduplicating job."""
    return Path(f"{prefix}{HASHES_SUFFIX}")


def loss_mask_prefix(prefix: str | Path) -> Path:
    """Returns the prefix of a loss mask: `<name>_document` becomes `<name>_loss_mask`."""
    return Path(f"{str(prefix).removesuffix(DOCUMENT_SUFFIX)}{LOSS_MASK_SUFFIX}")


def read_sidecar(prefix: str | Path) -> dict[str, Any] | None:
    """Reads and validates the sidecar of a dataset.

    Returns the contents, or None if the file does not exist, as for datasets that Megatron-LM
    wrote. Keys that the first version did not record have default values.

    Raises:
        UserError: The file cannot be read, is damaged or has an unknown format version.
    """
    path = sidecar_path(prefix)
    try:
        data = _read_small_file(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read: {path}: {error.strerror}") from error
    try:
        content = from_json(data)
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(path, "is not a JSON object")
    version = content.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise UserError(
            f"unknown sidecar: {path}: format_version {shorten(version)} instead of "
            f"{FORMAT_VERSION}: read it with the version of this package that wrote it"
        )
    try:
        _SCHEMA.validate_python(content)
    except ValidationError as error:
        raise _damaged(path, _first_problem(error)) from error
    if content["num_loss_tokens"] > content["num_tokens"]:
        raise _damaged(path, "num_loss_tokens: is larger than num_tokens")
    return content | {key: value for key, value in _DEFAULTS.items() if key not in content}


def check_counts(
    prefix: str | Path, sidecar: Mapping[str, Any], num_documents: int, num_tokens: int
) -> None:
    """Raises `UserError` if the counts in a sidecar differ from those of the dataset."""
    counts = {"num_documents": num_documents, "num_tokens": num_tokens}
    for key, count in counts.items():
        if sidecar[key] != count:
            raise UserError(
                f"{sidecar_path(prefix)} describes another dataset: {key} is {sidecar[key]} in "
                f"the .json, but {count} in the .idx: copy both again, or remove the .json"
            )


def _read_small_file(path: Path) -> bytes:
    """Reads a regular file of limited size.

    This prevents blocking on a named pipe and reading a file that does not fit into memory.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise UserError(f"cannot read: {path}: is {kind}")
    with path.open("rb") as file:
        data = file.read(MAX_SIDECAR_BYTES + 1)
    if len(data) > MAX_SIDECAR_BYTES:
        raise _damaged(path, f"is larger than {MAX_SIDECAR_BYTES >> 20} MiB")
    return data


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"damaged sidecar: {path}: {what}: copy the dataset with its .json again, or preprocess "
        "the data again"
    )


def _first_problem(error: ValidationError) -> str:
    """Returns the path and the message of the first problem, truncated to a readable length."""
    problem = error.errors(include_url=False, include_input=False)[0]
    keys = [str(key) if len(str(key)) <= 40 else f"{str(key)[:37]}..." for key in problem["loc"]]
    path = ".".join(key if key.isprintable() else ascii(key) for key in keys)
    return f"{path}: {problem['msg'][:120]}"


def appends_bos(sidecar: Mapping[str, Any] | None) -> bool:
    """Returns whether a dataset was preprocessed with `--append-bos`, according to its sidecar.

    Earlier versions neither recorded the option nor wrote BOS.
    """
    return sidecar is not None and sidecar["settings"].get("append_bos") is True


def appends_eod(sidecar: Mapping[str, Any] | None) -> bool:
    """Returns whether a dataset was preprocessed with `--append-eod`, according to its sidecar."""
    return sidecar is not None and sidecar["settings"].get("append_eod") is True


def settings_of(sidecar: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the preprocessing options of a dataset, with defaults for options added later."""
    return {"append_bos": False, **sidecar["settings"]}


def writes_bos(sidecar: Mapping[str, Any] | None) -> bool:
    """Returns whether documents contain BOS, from `--append-bos` or the user's chat template."""
    if sidecar is None:
        return False
    return appends_bos(sidecar) or "bos_token" in sidecar.get("template", {}).get("jinja", "")


def sidecar_bytes(content: dict[str, Any]) -> bytes:
    """Serializes a sidecar to the bytes of its file."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal.

    Raises:
        OSError: The file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
