"""Local copies of datasets on object stores and web servers.

Token files are read at random through memory maps, so a dataset is copied to the local disk once.
Its sidecar has the SHA-256 of every file, with which the copy is compared before it gets its name.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_chatflow import remote
from megatron_chatflow.data.indexed import bin_path, idx_path
from megatron_chatflow.data.sidecar import (
    DOCUMENT_SUFFIX,
    hashes_path,
    loss_mask_prefix,
    read_sidecar,
    sidecar_path,
)
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import as_user_error, is_url, write_atomically
from megatron_chatflow.remote import CachedPath, RemoteError, RemoteFile

logger = logging.getLogger(__name__)

_NUM_DATASETS = 4  # datasets that are copied at the same time


def fetch_dataset(url: str) -> CachedPath:
    """Copies a dataset, its loss mask and its sidecar to the local disk, unless they are there.

    If the store cannot be reached and a complete copy exists, the copy is used with a warning. A
    copy is complete from when its last file was copied until the first file of another version is;
    the file ``.NAME.complete`` records this.

    Args:
        url: The prefix of the dataset, without ``.bin`` or ``.idx``.

    Returns:
        The prefix of the copy.

    Raises:
        UserError: A file is missing, damaged, or does not fit on the disk.
        RemoteError: The store cannot be reached.
    """
    prefix = CachedPath.of(url)
    mask = loss_mask_prefix(prefix)
    required = [idx_path(prefix), bin_path(prefix)]
    complete = prefix.with_name(f".{prefix.name}.complete")
    optional = [sidecar_path(prefix), idx_path(mask), bin_path(mask)]
    try:
        found = {path: remote.stat(_url_of(path, url)) for path in [*optional, *required]}
    except RemoteError as error:
        if not all(path.exists() for path in (*required, complete)):
            raise
        logger.warning("%s; using the copy from an earlier run: %s", error, prefix)
        return prefix
    for path in required:
        if found[path] is None:
            raise UserError(
                f"cannot open dataset: {remote.mask(_url_of(path, url))}: no such file: "
                "check the URL, which must be given without .bin or .idx"
            )
    if not all(
        path.exists() is False if file is None else remote.is_copy(path, file)
        for path, file in found.items()
    ):
        with as_user_error(complete):
            complete.unlink(missing_ok=True)
    sidecar = found.pop(sidecar_path(prefix))
    hashes: dict[str, str] = {}
    if sidecar is not None:
        remote.download(sidecar, sidecar_path(prefix))
        content = read_sidecar(prefix)
        hashes = {} if content is None else content["sha256"]
        if "hashes" in hashes:  # of a partition, for merging
            path = hashes_path(prefix)
            found[path] = remote.stat(_url_of(path, url))
    else:
        sidecar_path(prefix).unlink(missing_ok=True)  # of an earlier version of the dataset
        logger.warning("%s: has no .json, so its copy is compared by size only", remote.mask(url))
    names = {
        hashes_path(prefix): "hashes",
        bin_path(prefix): "bin",
        idx_path(prefix): "idx",
        bin_path(mask): "loss_mask_bin",
    }
    for path, file in found.items():
        if file is None:
            path.unlink(missing_ok=True)
            continue
        digest = hashes.get(names.get(path, ""))
        check = None if digest is None else remote.sha256_damage(digest)
        remote.download(file, path, find_damage=check)
    with as_user_error(complete):
        if not complete.exists():
            write_atomically(complete, "")
    return prefix


def fetch_datasets(urls: Sequence[str]) -> None:
    """Copies several datasets as `fetch_dataset` does, some at the same time."""
    with ThreadPoolExecutor(_NUM_DATASETS) as pool:
        for _ in pool.map(fetch_dataset, dict.fromkeys(urls)):
            pass


def local_prefix(location: str) -> str:
    """Returns the prefix of a dataset for reading: itself, or that of the copy of a URL."""
    location = remote.parse_location(location)
    return str(fetch_dataset(location)) if is_url(location) else location


def local_prefixes(locations: Sequence[str]) -> list[str]:
    """As `local_prefix` for several locations; a URL of a folder stands for its datasets."""
    prefixes = []
    for location in map(remote.parse_location, locations):
        if not is_url(location):
            prefixes.append(location)
        elif remote.stat(f"{location.rstrip('/')}.idx") is not None:
            prefixes.append(str(fetch_dataset(location)))
        else:
            prefixes += [str(fetch_dataset(url)) for url in _find_datasets(location)]
    return prefixes


def _find_datasets(folder: str) -> list[str]:
    suffix = f"{DOCUMENT_SUFFIX}.idx"
    found: list[RemoteFile] = remote.find(folder)
    urls = [file.url.removesuffix(".idx") for file in found if file.url.endswith(suffix)]
    if not urls:
        raise UserError(
            f"no dataset: {remote.mask(folder)}: is neither the prefix of a dataset nor a folder "
            f"with *{suffix} files"
        )
    return urls


def _url_of(path: Path, url: str) -> str:
    return f"{url.rstrip('/').rpartition('/')[0]}/{path.name}"
