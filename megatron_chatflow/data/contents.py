"""Checks that the files of a run's datasets match their recorded hashes.

Sizes and counts do not detect bytes that changed in place, for example a copy that was resumed at
the wrong offset. Every start therefore hashes sample blocks of each `.bin`, `.idx` and loss mask
(`fingerprint.block_hash`) and compares them with the sidecar, and a resume also with the
checkpoint. `verify_contents` compares whole files.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from megatron_chatflow.config import DataConfig
from megatron_chatflow.data.fingerprint import block_hash, check_recorded_hash, dataset_files
from megatron_chatflow.data.sidecar import read_sidecar, sha256_of
from megatron_chatflow.data.source import Source
from megatron_chatflow.errors import UserError

logger = logging.getLogger(__name__)

_NUM_THREADS = 16
"""More threads than cores, because reading sample blocks waits for the file server."""


class _File(NamedTuple):
    """One file of a dataset, with its name in the sidecar and its path in the configuration."""

    label: str
    prefix: str
    name: str
    path: Path


def check_contents(data: DataConfig, splits: Iterable[Sequence[Source]]) -> None:
    """Compares sample blocks of every file with its sidecar and records the hashes in the sources.

    ``splits`` are the sources that `build_sources` made for each split. Shared files are read once.

    Raises:
        UserError: A file cannot be read or differs from the one that its sidecar describes. The
            message begins with the path in the configuration.
    """
    splits = [list(sources) for sources in splits]
    files = list(_files(data, splits))
    hashes = _hash_files(block_hash, files)
    _compare(files, hashes, "block_hash")
    for sources in splits:
        for source in sources:
            source.record_contents(hashes)


def verify_contents(
    data: DataConfig, splits: Iterable[Sequence[Source]], *, part: int = 0, num_parts: int = 1
) -> None:
    """Compares whole files with the SHA-256 in their sidecars; see `check_contents`.

    ``part`` is the index of this process among the ``num_parts`` of the node that share the work.

    Raises:
        UserError: A file cannot be read or its SHA-256 differs from the recorded one.
    """
    files = list(_files(data, splits))
    unknown = dict.fromkeys(file.prefix for file in files if read_sidecar(file.prefix) is None)
    if unknown and part == 0:
        logger.warning(
            "--data-verify: %d datasets have no .json, so only sampled blocks are "
            "compared with the checkpoint (first: %s)",
            *(len(unknown), next(iter(unknown))),
        )
    share = [file for file in files if file.prefix not in unknown][part::num_parts]
    _compare(share, _hash_files(sha256_of, share), "sha256")


def _files(data: DataConfig, splits: Iterable[Sequence[Source]]) -> Iterator[_File]:
    """Yields every file of the sources once, labelled with its first path in the configuration."""
    seen: set[Path] = set()
    for number, sources in enumerate(splits):
        for source in sources:
            config = data.sources[source.name]
            field = "validation_paths" if number and config.validation_paths else "paths"
            for index, dataset in enumerate(source.files):
                label = f"data.sources.{source.name}.{field}[{index}]"
                has_mask = dataset.loss_mask is not None
                for name, path in dataset_files(dataset.name, with_loss_mask=has_mask).items():
                    if path not in seen:
                        seen.add(path)
                        yield _File(label, dataset.name, name, path)


def _hash_files(digest: Callable[[Path], str], files: Sequence[_File]) -> dict[Path, str]:
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        pending = [(file, pool.submit(digest, file.path)) for file in files]
        hashes = {}
        try:
            for file, future in pending:
                hashes[file.path] = future.result()
        except (UserError, OSError) as error:
            pool.shutdown(cancel_futures=True)
            reason = error if isinstance(error, UserError) else f"{file.path}: {error.strerror}"
            raise UserError(f"{file.label}: {reason}") from error
    return hashes


def _compare(files: Sequence[_File], hashes: Mapping[Path, str], key: str) -> None:
    sidecars = {prefix: read_sidecar(prefix) for prefix in {file.prefix for file in files}}
    for file in files:
        sidecar = sidecars[file.prefix]
        if sidecar is None:
            continue
        try:
            check_recorded_hash(file.prefix, sidecar, key, file.name, file.path, hashes[file.path])
        except UserError as error:
            raise UserError(f"{file.label}: {error}") from error
