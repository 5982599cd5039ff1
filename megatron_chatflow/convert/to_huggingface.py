"""A training checkpoint as a Hugging Face folder.

From a distributed checkpoint of any parallel layout come safetensors, `config.json`, and the small
files that travel with the model; `transformers` loads the folder as `LlamaForCausalLM`. One process
reads tensor by tensor; memory holds one tensor.

An output folder that appears complete or not at all.

It is written beside its final name, flushed to the disk and renamed. ``.NAME.lock`` keeps a second
process of the same output out. What a killed process left is removed by the next one that writes
into the same parent folder: half a model takes up room.
"""

import errno
import logging
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_chatflow.checkpoint.files import (
    CARRIED,
    check_small_files,
    read_state,
    resolve_checkpoint,
)
from megatron_chatflow.checkpoint.recorded_config import read_run_config
from megatron_chatflow.convert.distributed import DistributedReader
from megatron_chatflow.convert.safetensors import write_shards
from megatron_chatflow.convert.shape import DTYPES, LlamaShape, trained_shape
from megatron_chatflow.convert.template import TokenizerChoice, files_of_export
from megatron_chatflow.convert.weight_map import huggingface_shapes, placements, split
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import (
    FileLock,
    check_output_folder,
    host_name,
    refuse_url,
    sync_folder,
    sync_tree,
)
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer
from megatron_chatflow.tokenizer.base import sha256_of
from megatron_chatflow.tokenizer.small_files import write_small_files

logger = logging.getLogger(__name__)

_PARTIAL, _OLD = "partial", "old"
_LEFTOVER = re.compile(rf"\.(.+)\.([\w-]+)\.([0-9a-f]{{8}})\.({_PARTIAL}|{_OLD})")
_EARLIER_LEFTOVER = re.compile(rf"\.(.+)\.\d+\.({_PARTIAL}|{_OLD})")  # named by process id


def check_new_folder(output: Path, *, overwrite: bool, mark: str) -> None:
    """Refuses, before any work, what `new_folder` would refuse; leaves nothing behind.

    Args:
        output: The final name.
        overwrite: Whether a folder of that name is replaced.
        mark: A file by which a folder of the kind that is written is known.

    Raises:
        UserError: The folder is there already, or cannot be written.
    """
    refuse_url(output)
    _refuse_existing(output, overwrite=overwrite, mark=mark)
    check_output_folder(output.absolute().parent)


@contextmanager
def new_folder(output: Path, *, overwrite: bool, mark: str, num_bytes: int) -> Iterator[Path]:
    """Gives a folder to write into that becomes ``output`` when the block ends without an error.

    Args:
        output: The final name.
        overwrite: Whether a folder of that name is replaced.
        mark: A file by which a folder of the kind that is written is known: no other is replaced.
        num_bytes: What will be written, about.

    Raises:
        UserError: The folder is there already, or the disk is full, or not writable, or another
            process is writing the same folder.
    """
    _refuse_existing(output, overwrite=overwrite, mark=mark)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock.acquire(_lock_path(output))
    except OSError as error:
        raise _cannot_be_written(output, error) from error
    if lock is None:
        raise UserError(f"{output}: another process is writing it; wait for it or name another")
    token = f"{host_name()}.{secrets.token_hex(4)}"
    beside, old = (output.with_name(f".{output.name}.{token}.{kind}") for kind in (_PARTIAL, _OLD))
    try:
        if lock.is_effective:
            _remove_leftovers(output)
            _refuse_existing(output, overwrite=overwrite, mark=mark)  # one may have been restored
        free = shutil.disk_usage(output.parent).free
        if free < num_bytes:
            raise UserError(
                f"{output}: needs {num_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free there; "
                "free some or name another folder"
            )
        beside.mkdir()
        yield beside
        sync_tree(beside)
        _replace(output, beside, old)
    except OSError as error:
        raise _cannot_be_written(output, error) from error
    finally:
        _remove_tree(beside)
        lock.release()


def _cannot_be_written(output: Path, error: OSError) -> UserError:
    reason = "no space left" if error.errno == errno.ENOSPC else error.strerror or str(error)
    return UserError(f"{output}: cannot be written ({reason}); name another folder")


def _lock_path(output: Path) -> Path:
    return output.with_name(f".{output.name}.lock")


def _refuse_existing(output: Path, *, overwrite: bool, mark: str) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output}: is a file; name a folder")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{output}: is there already; give --overwrite to replace it")
    if not (output / mark).exists():
        raise UserError(
            f"{output}: holds something else (no {mark}), which --overwrite does not replace; "
            "name another folder"
        )


def _replace(output: Path, beside: Path, old: Path) -> None:
    """Renames; a folder that was there goes only once the new one stands in its place."""
    try:
        if output.exists():
            output.rename(old)
        beside.rename(output)
    except BaseException:
        if old.exists() and not output.exists():
            old.rename(output)
        raise
    try:
        sync_folder(output.parent)
    except OSError as error:
        kept = f"; what it replaced is in {old} until the next run" if old.exists() else ""
        raise UserError(f"{output}: {error.strerror}{kept}; check the disk") from error
    _remove_tree(old)


def _remove_leftovers(output: Path) -> None:
    """Removes what killed processes of this host left beside ``output``, which is locked.

    A folder that was to be replaced by one that never came gets its name back. Leftovers of other
    hosts, whose locks may not be seen here, are only reported.
    """
    foreign = []
    try:
        paths = sorted(output.parent.iterdir())
    except PermissionError:  # a folder that may be written to but not listed
        return
    for path in paths:
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or match[2] != host_name():
            known = match or _EARLIER_LEFTOVER.fullmatch(path.name)
            if known is not None and known[1] == output.name:
                foreign.append(path.name)
        elif match[1] == output.name:
            _clear(path, output)
        else:
            with suppress(OSError):  # another user's
                _clear_locked(path, path.with_name(match[1]))
    if foreign:
        logger.warning(
            "%s: %s: left, or being written, by another host or an earlier version; remove it if "
            "nothing runs there",
            output.parent,
            ", ".join(foreign),
        )


def _clear_locked(path: Path, output: Path) -> None:
    lock = FileLock.acquire(_lock_path(output))
    if lock is None:
        return
    try:
        if lock.is_effective:
            _clear(path, output)
    finally:
        lock.release()


def _clear(path: Path, output: Path) -> None:
    if path.name.endswith(_OLD) and not output.exists():
        path.rename(output)
        logger.info("%s: restored from %s, which a killed process left", output, path.name)
        return
    _remove_tree(path)
    logger.info("%s: removed, a killed process left it", path)


def _remove_tree(path: Path) -> None:
    if path.is_symlink():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote.

    Attributes:
        folder: Where.
        num_tensors: Tensors.
        num_bytes: Bytes of their values.
        num_parameters: Values.
        has_masters: Whether they are the optimizer's fp32 master weights.
    """

    folder: Path
    num_tensors: int
    num_bytes: int
    num_parameters: int
    has_masters: bool = False

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"wrote {self.folder}: {self.num_tensors} tensors, {self.num_parameters:,} parameters, "
            f"{self.num_bytes / 1e6:,.1f} MB"
            + (", from the optimizer's fp32 master weights" if self.has_masters else "")
        )


def find_checkpoint(path: Path) -> Path:
    """The ``iter_`` folder that a path means: itself, or the latest of a run.

    Raises:
        UserError: There is none, or one of its small files is not as it was saved.
    """
    checkpoint = resolve_checkpoint(path)
    if checkpoint is None:
        raise UserError(
            f"{path}: holds no checkpoint; name a run's folder or one of its iter_ ones"
        )
    check_small_files(checkpoint)
    return checkpoint


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    dtype: str | None = None,
    tokenizer: TokenizerChoice | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> Converted:
    """Writes a checkpoint as a Hugging Face folder.

    Args:
        checkpoint: A run's folder, or one of its ``iter_`` folders.
        output: The new folder; it appears when it is complete.
        dtype: ``fp32``, ``bf16`` or ``fp16``; None keeps the stored one. Another one than the
            stored bf16 comes from the optimizer's fp32 master weights, where the checkpoint has
            them; rounded to bf16 they are the stored weights, bit for bit.
        tokenizer: Which tokenizer and chat template; None takes the run's.
        max_shard_bytes: The most bytes of a safetensors file.
        overwrite: Whether an earlier export of that name is replaced.

    Raises:
        UserError: The checkpoint is damaged or of another model, the tokenizer is not the run's,
            or the folder cannot be written.
    """
    check_new_folder(output, overwrite=overwrite, mark="config.json")
    checkpoint = find_checkpoint(checkpoint)
    shape = trained_shape(checkpoint)
    reader = DistributedReader(checkpoint)
    check_shapes(reader, shape)
    stored = reader.dtype(*placements(shape)[0])
    target = stored if dtype is None else DTYPES[dtype]
    if target != stored and stored == torch.bfloat16:
        # The weights are these, rounded: another precision than theirs rounds once and not twice.
        reader = DistributedReader(checkpoint, masters=True)
        check_shapes(reader, shape)
    choice = tokenizer or TokenizerChoice()
    files = files_of_export(checkpoint, choice, run_tokenizer(checkpoint, choice), shape, target)
    shapes = huggingface_shapes(shape)
    num_parameters = sum(torch.Size(size).numel() for size in shapes.values())
    num_bytes = num_parameters * target.itemsize
    with new_folder(output, overwrite=overwrite, mark="config.json", num_bytes=num_bytes) as folder:
        write_shards(folder, shapes, target, _tensors(reader, shape), max_shard_bytes)
        write_small_files(folder, files)
    has_masters = stored != reader.dtype(*placements(shape)[0])
    return Converted(output, len(shapes), num_bytes, num_parameters, has_masters)


def check_shapes(reader: DistributedReader, shape: LlamaShape) -> None:
    """Compares stored shapes with the model's; vocabulary rows may be padded.

    Raises:
        UserError: A tensor is missing, or has another shape or a dtype that no weight has.
    """
    for rule, layer in placements(shape):
        stored, expected = reader.shape(rule, layer), rule.shape(shape)
        reader.dtype(rule, layer)  # refuses what is no dtype of weights
        is_padded = (
            rule.has_vocabulary_rows
            and len(stored) == len(expected)
            and stored[0] >= expected[0]
            and stored[1:] == expected[1:]
        )
        if not (is_padded or stored == expected):
            raise UserError(
                f"{reader.folder}: {rule.megatron.format(layer=layer)} is {list(stored)} and the "
                f"model's is {list(expected)}; state.json belongs to another checkpoint"
            )


def read_weight(
    reader: DistributedReader, shape: LlamaShape, placement: tuple[Any, int | None]
) -> list[tuple[str, torch.Tensor]]:
    """A megatron-core tensor as its Hugging Face tensors, without padding rows.

    Args:
        reader: The checkpoint.
        shape: The model's shape.
        placement: One of `placements`.

    Returns:
        Names and tensors.
    """
    rule, layer = placement
    whole = reader.read(rule, layer)
    if rule.has_vocabulary_rows:
        whole = whole[: shape.vocab_size]
    names = [part.name.format(layer=layer) for part in rule.parts]
    return list(zip(names, split(rule, shape, whole), strict=True))


def run_tokenizer(checkpoint: Path, choice: TokenizerChoice) -> Tokenizer | None:
    """The tokenizer that a checkpoint was trained with.

    Args:
        checkpoint: An ``iter_`` folder.
        choice: What the user asked for.

    Returns:
        The tokenizer; None where it is left out or was never known.

    Raises:
        UserError: It cannot be found, or is another one.
    """
    recorded = read_state(checkpoint).get("tokenizer") or {}
    if not isinstance(recorded, Mapping):
        raise UserError(
            f"{checkpoint / 'state.json'}: tokenizer is no object; load another checkpoint"
        )
    if choice.leave_out:
        return None
    path = choice.model or _carried_tokenizer(checkpoint, recorded)
    path = path or read_run_config(checkpoint).tokenizer.tokenizer_model
    if path is None:
        logger.warning("%s names no tokenizer: exporting without one", checkpoint)
        return None
    if not path.exists():
        raise UserError(f"{path}: the run's tokenizer is not there; {choice.advice}")
    tokenizer = load_tokenizer(path, str(recorded.get("type") or "auto"))
    if recorded.get("sha256") not in (None, tokenizer.fingerprint):
        raise UserError(
            f"{path}: is not the tokenizer that {checkpoint} was trained with; {choice.advice}"
        )
    return tokenizer


def _carried_tokenizer(checkpoint: Path, recorded: Mapping[str, Any]) -> Path | None:
    """The copy of the run's tokenizer in the checkpoint itself; None if there is none."""
    for name in ("tokenizer.model", "tokenizer.json"):
        path = checkpoint / CARRIED / name
        if path.is_file() and sha256_of(path.read_bytes()) == recorded.get("sha256"):
            return path
    return None


def _tensors(reader: DistributedReader, shape: LlamaShape) -> Iterator[tuple[str, torch.Tensor]]:
    for placement in tqdm(placements(shape), unit="tensor", desc="export", disable=None):
        yield from read_weight(reader, shape, placement)
