"""Folders and small files of checkpoints: names, the latest one, hashes and identity.

A run's folder holds one folder for each checkpoint, such as ``iter_0000100``, and
``latest_checkpointed_iteration.txt``. Every checkpoint has ``hashes.json`` with the hashes of its
files, recorded while they were written. The hashes detect damage by disks, networks and copies;
they do not prove who wrote a checkpoint.
"""

import json
import logging
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from megatron_chatflow.checkpoint.direct_file import ALGORITHM, ALGORITHMS, FileHash, hash_file
from megatron_chatflow.data.fingerprint import sampled_hash
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import is_disk_full, write_atomically

logger = logging.getLogger(__name__)

LATEST = "latest_checkpointed_iteration.txt"
CARRIED = "huggingface"  # the folder of small files that an export writes back
MANIFEST = "hashes.json"
TENSORS = ".distcp"
_HEXADECIMAL = re.compile(r"[0-9a-f]{32}")
_MOST_DIGITS = 18
_ITERATION_FOLDER = re.compile(r"iter_(\d{7,})")
_HUGGINGFACE_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")


def iteration_folder(root: Path, iteration: int) -> Path:
    """``root/iter_0000100`` for iteration 100, as Megatron names it."""
    return root / f"iter_{iteration:07d}"


def write_unless_disk_full(path: Path, text: str, *, otherwise: str) -> None:
    """Writes a file with `write_atomically`; a full disk leaves it unchanged and logs a warning.

    ``otherwise`` is the consequence of not writing the file, for the warning.
    """
    try:
        write_atomically(path, text)
    except OSError as error:
        if not is_disk_full(error):
            raise
        logger.warning("%s: %s; %s", path, error.strerror, otherwise)


def latest_iteration(root: Path) -> int | None:
    """Returns the iteration that a run's folder names as its latest; None if none was saved."""
    path = root / LATEST
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if not text.isdecimal() or len(text) > _MOST_DIGITS:
        raise UserError(
            f"{path}: {text[:40]!r} is not an iteration number; write the number of an "
            "existing checkpoint"
        )
    iteration = int(text)
    if not iteration_folder(root, iteration).is_dir():
        raise UserError(
            f"{path}: names iteration {iteration}, but {iteration_folder(root, iteration)} does "
            "not exist; write the number of an existing checkpoint"
        )
    return iteration


def find_iterations(root: Path) -> list[int]:
    """Returns the iterations of the checkpoints in a run's folder, in ascending order."""
    return sorted(
        int(match[1])
        for path in root.iterdir()
        if path.is_dir() and (match := _ITERATION_FOLDER.fullmatch(path.name))
    )


def retained(
    found: Sequence[int], latest: int | None, *, retain: int | None, keep_every: int | None
) -> set[int]:
    """Returns which of the iterations ``found``, in ascending order, the retention rule keeps.

    These are the latest one, the newest ``retain`` (all if None) and the multiples of
    ``keep_every``.
    """
    if retain is None:
        return set(found)
    multiples = {one for one in found if keep_every is not None and one % keep_every == 0}
    return {*found[-retain:], *multiples, *(one for one in found if one == latest)}


def prune(
    root: Path, *, retain: int, keep_every: int | None, pinned: Collection[int] = ()
) -> list[int]:
    """Removes all checkpoints but the newest ``retain`` and the multiples of ``keep_every``.

    The latest one and those in ``pinned`` are always kept. A folder is renamed before it is
    removed, so that an interrupted removal never leaves something that looks like a checkpoint.
    Returns the removed iterations.
    """
    found = find_iterations(root)
    kept = retained(found, latest_iteration(root), retain=retain, keep_every=keep_every)
    removed = []
    for iteration in found:
        if iteration in kept or iteration in pinned:
            continue
        folder = iteration_folder(root, iteration)
        doomed = root / f".{folder.name}.removed"
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        removed.append(iteration)
    return removed


def is_iteration_folder(path: Path) -> bool:
    """Returns whether ``path`` is an ``iter_`` folder, or a link to one."""
    return bool(_ITERATION_FOLDER.fullmatch(path.resolve().name)) and path.is_dir()


def resolve_checkpoint(path: Path) -> Path | None:
    """Returns the checkpoint at ``path``: itself, or the latest one of a run's folder, or None."""
    if is_iteration_folder(path):
        return path
    iteration = latest_iteration(path) if path.is_dir() else None
    return None if iteration is None else iteration_folder(path, iteration)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Reads ``state.json`` of a checkpoint folder, which must be a JSON object."""
    path = checkpoint / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{checkpoint}: is not a checkpoint (no state.json)") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged ({error}); load another checkpoint") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: is damaged (not a JSON object); load another checkpoint")
    return state


def carried_paths(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Maps names of carried files to their paths relative to a checkpoint's folder."""
    return {f"{CARRIED}/{name}": data for name, data in files.items()}


def manifest_text(hashes: Mapping[str, FileHash]) -> str:
    """Returns the content of ``hashes.json``."""
    files = {
        name: {"bytes": hashes[name].num_bytes, "digest": hashes[name].digest}
        for name in sorted(hashes)
    }
    return json.dumps({"algorithm": ALGORITHM, "files": files}, indent=1) + "\n"


@dataclass(frozen=True)
class Manifest:
    """The content of ``hashes.json``."""

    algorithm: str  # one of `direct_file.ALGORITHMS`
    files: dict[str, FileHash]  # the hash of each file, by name relative to the checkpoint's folder


def read_manifest(checkpoint: Path) -> Manifest:
    """Reads ``hashes.json``."""
    path = checkpoint / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["algorithm"] not in ALGORITHMS:
            raise ValueError("unsupported hash algorithm")
        files = {name: _entry(name, entry) for name, entry in content["files"].items()}
        return Manifest(content["algorithm"], files)
    except FileNotFoundError:
        raise UserError(
            f"{checkpoint}: has no {MANIFEST}, so its files cannot be verified; it was saved by "
            "another program or an earlier version"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: is damaged ({error}); use another checkpoint") from None


def _entry(name: str, entry: Any) -> FileHash:
    parts = name.split("/")
    if "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{name!r} is not a file name within the folder")
    num_bytes, digest = entry["bytes"], entry["digest"]
    if type(num_bytes) is not int or not _HEXADECIMAL.fullmatch(digest):
        raise ValueError(f"invalid hash of {name}")
    return FileHash(num_bytes, digest)


def find_damage(
    checkpoint: Path, *, part: int = 0, num_parts: int = 1, only_small: bool = False
) -> list[str]:
    """Reads the files and compares their hashes with the recorded ones.

    Args:
        checkpoint: An ``iter_`` folder.
        part: Which of ``num_parts`` parts of the files to read, so that ranks share the work.
        num_parts: The number of parts.
        only_small: Whether to skip the tensor files, which are nearly all of a checkpoint.

    Returns:
        A line for each file that is missing, differs from what was saved, or has no recorded hash.
    """
    manifest = read_manifest(checkpoint)
    recorded = manifest.files
    present = {
        path.relative_to(checkpoint).as_posix()
        for path in checkpoint.rglob("*")
        if part == 0 and not path.is_dir()
    } - {MANIFEST, *recorded}
    found = [f"{MANIFEST} has no hash of {name}" for name in sorted(present)]
    names = [name for name in sorted(recorded) if not (only_small and name.endswith(TENSORS))]
    for name in names[part::num_parts]:
        path = checkpoint / name
        try:
            size = path.stat().st_size
            if size != recorded[name].num_bytes:
                found.append(
                    f"{name} has {size} bytes, but {MANIFEST} records {recorded[name].num_bytes}"
                )
            elif hash_file(path, manifest.algorithm) != recorded[name]:
                found.append(
                    f"{name} has changed since it was saved (its hash differs from {MANIFEST})"
                )
        except FileNotFoundError:
            found.append(f"{name} is missing, but listed in {MANIFEST}")
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
    return found


def raise_if_damaged(checkpoint: Path, found: list[str]) -> None:
    """Raises `UserError` with the lines of `find_damage`, if there are any."""
    if found:
        raise UserError(f"{checkpoint}: is damaged: {'; '.join(found)}; load another checkpoint")


def check_small_files(checkpoint: Path) -> None:
    """Compares the small files, which describe the tensor files, with their recorded hashes.

    A checkpoint without recorded hashes, of another program or an earlier version, is accepted.
    """
    if (checkpoint / MANIFEST).exists():
        raise_if_damaged(checkpoint, find_damage(checkpoint, only_small=True))


def identity(folder: Path, *, is_huggingface: bool = False) -> str:
    """Returns a hash by which copies of a checkpoint are recognized without reading them whole.

    The hash is a blake2b-128 in hexadecimal, of the recorded hashes if there are any, or else of
    sizes and sampled blocks of the files.
    """
    digest = blake2b(digest_size=16)
    if not is_huggingface and (folder / MANIFEST).is_file():
        for name, file in read_manifest(folder).files.items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != file.num_bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise UserError(
                    f"{path}: {found}, but {MANIFEST} records {file.num_bytes} bytes; use "
                    "another checkpoint"
                )
            digest.update(f"{name} {file.num_bytes} {file.digest}\n".encode())
        return digest.hexdigest()
    patterns = _HUGGINGFACE_FILES if is_huggingface else ("*", ".metadata")
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    if not paths:
        raise UserError(f"{folder}: contains no checkpoint")
    for path in sorted(paths):
        digest.update(f"{path.name} {sampled_hash(path)}\n".encode())
    return digest.hexdigest()
