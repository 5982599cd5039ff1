"""The hashes of a checkpoint's files: recorded while they are written, compared on demand.

In: a checkpoint folder. Out: ``hashes.json``, or the list of damaged files. Hashes find damage by
disks, networks and copies; they do not prove who wrote a checkpoint.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_chatflow.checkpoint.direct_file import FileHash, hash_file
from megatron_chatflow.errors import UserError

MANIFEST = "hashes.json"
ALGORITHM = "blake2b-128 of the length and of each 64 KiB leaf's blake2b-128"
TENSORS = ".distcp"
_HEXADECIMAL = re.compile(r"[0-9a-f]{32}")


def manifest_text(hashes: Mapping[str, FileHash]) -> str:
    """What ``hashes.json`` holds."""
    files = {
        name: {"bytes": hashes[name].num_bytes, "digest": hashes[name].digest}
        for name in sorted(hashes)
    }
    return json.dumps({"algorithm": ALGORITHM, "files": files}, indent=1) + "\n"


def read_manifest(checkpoint: Path) -> dict[str, FileHash]:
    """Reads ``hashes.json``.

    Raises:
        UserError: There is none, or it is damaged.
    """
    path = checkpoint / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["algorithm"] != ALGORITHM:
            raise ValueError("hashes of another kind")
        return {name: _entry(name, entry) for name, entry in content["files"].items()}
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
        raise ValueError(f"{name!r} is no file of the folder")
    num_bytes, digest = entry["bytes"], entry["digest"]
    if type(num_bytes) is not int or not _HEXADECIMAL.fullmatch(digest):
        raise ValueError(f"no hash of {name}")
    return FileHash(num_bytes, digest)


def damage(
    checkpoint: Path, *, part: int = 0, num_parts: int = 1, only_small: bool = False
) -> list[str]:
    """Reads the files again and compares their hashes.

    Args:
        checkpoint: An ``iter_`` folder.
        part: Which of ``num_parts`` shares of the files is read, so that ranks share the work.
        num_parts: How many shares.
        only_small: Leaves out the files of the tensors, which are nearly all of a checkpoint.

    Returns:
        A line for each file that is missing, is not as it was saved, or has no recorded hash.

    Raises:
        UserError: The recorded hashes are missing or damaged.
    """
    recorded = read_manifest(checkpoint)
    present = {
        path.relative_to(checkpoint).as_posix()
        for path in checkpoint.rglob("*")
        if part == 0 and not path.is_dir()
    } - {MANIFEST, *recorded}
    found = [f"{MANIFEST} has nothing of {name}" for name in sorted(present)]
    names = [name for name in sorted(recorded) if not (only_small and name.endswith(TENSORS))]
    for name in names[part::num_parts]:
        path = checkpoint / name
        try:
            size = path.stat().st_size
            if size != recorded[name].num_bytes:
                found.append(
                    f"{name} has {size} bytes, not {recorded[name].num_bytes} as {MANIFEST} says"
                )
            elif hash_file(path) != recorded[name]:
                found.append(f"{name} is not what was saved (its hash is not that of {MANIFEST})")
        except FileNotFoundError:
            found.append(f"{name} is missing, and {MANIFEST} names it")
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
    return found


def refuse_damage(checkpoint: Path, found: list[str]) -> None:
    """Raises if there is any.

    Raises:
        UserError: Names every damaged file.
    """
    if found:
        raise UserError(f"{checkpoint}: is damaged: {'; '.join(found)}; load another checkpoint")


def refuse_small_damage(checkpoint: Path) -> None:
    """Raises if one of the small files, which say what the large ones mean, is not as it was saved.

    A checkpoint without recorded hashes passes: another program or an earlier version saved it.

    Raises:
        UserError: Names every such file.
    """
    if (checkpoint / MANIFEST).exists():
        refuse_damage(checkpoint, damage(checkpoint, only_small=True))
