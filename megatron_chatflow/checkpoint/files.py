"""The folder names of a run's checkpoints, and which of them is the latest."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from megatron_chatflow.errors import UserError
from megatron_chatflow.files import is_for_want_of_room, write_atomically

logger = logging.getLogger(__name__)

LATEST = "latest_checkpointed_iteration.txt"
_MOST_DIGITS = 18
_ITERATION_FOLDER = re.compile(r"iter_(\d{7,})")


def iteration_folder(root: Path, iteration: int) -> Path:
    """``root/iter_0000100`` for iteration 100, as Megatron names it."""
    return root / f"iter_{iteration:07d}"


def write_if_there_is_room(path: Path, text: str, *, otherwise: str) -> None:
    """As `write_atomically`; for want of room the file stays as it is, with a warning.

    Args:
        path: The file.
        text: What it is to hold.
        otherwise: What the warning says of a file that is not written.
    """
    try:
        write_atomically(path, text)
    except OSError as error:
        if not is_for_want_of_room(error):
            raise
        logger.warning("%s: %s; %s", path, error.strerror, otherwise)


def latest_iteration(root: Path) -> int | None:
    """The iteration that a run's folder calls its latest, or None where none was ever saved.

    Raises:
        UserError: The file is there and does not hold a number, or its folder is missing.
    """
    path = root / LATEST
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if not text.isdecimal() or len(text) > _MOST_DIGITS:
        raise UserError(f"{path}: {text[:40]!r} is not an iteration; write the number of one there")
    iteration = int(text)
    if not iteration_folder(root, iteration).is_dir():
        raise UserError(
            f"{path}: names iteration {iteration}, and {iteration_folder(root, iteration)} is not "
            "there; write the number of a checkpoint that is"
        )
    return iteration


def prune(root: Path, *, retain: int, keep_every: int | None) -> list[int]:
    """Removes old checkpoints: all but the newest ``retain`` and the multiples of ``keep_every``.

    The latest one always stays. A folder is renamed before it is emptied, so that what is left of a
    removal that was cut short never looks like a checkpoint.

    Returns:
        The iterations whose checkpoints were removed.
    """
    latest = latest_iteration(root)
    found = sorted(
        int(match[1])
        for path in root.iterdir()
        if path.is_dir() and (match := _ITERATION_FOLDER.fullmatch(path.name))
    )
    removed = []
    for iteration in found[:-retain]:
        is_kept = keep_every is not None and iteration % keep_every == 0
        if iteration == latest or is_kept:
            continue
        folder = iteration_folder(root, iteration)
        doomed = root / f".{folder.name}.removed"
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        removed.append(iteration)
    return removed


def is_iteration_folder(path: Path) -> bool:
    """Whether ``path`` is a checkpoint's own folder, by its name, or a link to one."""
    return bool(_ITERATION_FOLDER.fullmatch(path.resolve().name)) and path.is_dir()


def resolve_checkpoint(path: Path) -> Path | None:
    """The checkpoint folder that ``path`` means: itself, or the latest of the run's folder.

    Returns:
        The folder, or None if ``path`` holds no checkpoint.
    """
    if is_iteration_folder(path):
        return path
    iteration = latest_iteration(path) if path.is_dir() else None
    return None if iteration is None else iteration_folder(path, iteration)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Reads ``state.json`` of a checkpoint folder.

    Raises:
        UserError: It is missing or no JSON object.
    """
    path = checkpoint / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{checkpoint}: has no state.json and so is no checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged ({error}); load another checkpoint") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: is damaged (no object); load another checkpoint")
    return state
