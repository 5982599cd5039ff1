"""Outputs whose prefix is a URL: built on the local disk, then uploaded.

`StagedUpload` provides the local folder. The folder depends on the URL only and is removed after
the upload, so that the same command continues after a kill or a network failure.
"""

import hashlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_chatflow import remote
from megatron_chatflow.data.indexed import idx_path
from megatron_chatflow.data.sidecar import read_sidecar, sidecar_path
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import FileLock, as_user_error, write_atomically

logger = logging.getLogger(__name__)

_UPLOADED = ".uploaded"  # lists the files that the store has; present once an upload has begun


class StagedUpload:
    """The local folder of an output that belongs at a URL.

    Attributes:
        folder: The local folder.
        prefix: The local prefix that stands for the URL's.
    """

    def __init__(self, output_prefix: str, *, job: str = "") -> None:
        """Checks the URL. ``job`` distinguishes jobs that write different files there.

        Raises:
            UserError: Files cannot be written to the URL.
        """
        remote.refuse_web(output_prefix)
        if remote.has_magic(output_prefix) or "?" in output_prefix:
            raise UserError(f"--output-prefix {output_prefix}: must not contain * ? or [")
        parent, _, name = output_prefix.rstrip("/").rpartition("/")
        if parent.endswith(":/"):
            raise UserError(f"--output-prefix {output_prefix}: must have a name after the bucket")
        self._url, self._parent = output_prefix, parent
        key = hashlib.sha256(f"{output_prefix} {job}".encode()).hexdigest()[:16]
        self.folder = remote.cache_folder() / "outputs" / key
        self.prefix = self.folder / name
        self._lock: FileLock | None = None

    def __enter__(self) -> "StagedUpload":
        """Creates and locks the folder."""
        path = self.folder.with_name(f".{self.folder.name}.lock")
        with as_user_error(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock.acquire(path, for_writing=True)
        if self._lock is None:
            raise UserError(
                f"{self._url}: another job on this machine is writing it; wait until it finishes, "
                "or choose another prefix"
            )
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Removes the folder after success; otherwise it is kept for another attempt."""
        if error is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif not any(path.name != _UPLOADED for path in self.folder.glob("*")):
            shutil.rmtree(self.folder, ignore_errors=True)
        assert self._lock is not None
        self._lock.release()

    def published_sidecar(self, prefix: Path) -> dict[str, Any] | None:
        """Returns the sidecar that the store has of a complete dataset; None without one."""
        if remote.stat(self._url_of(idx_path(prefix))) is None:
            return None
        path = sidecar_path(prefix)
        file = remote.stat(self._url_of(path))
        if file is None:
            return None
        remote.download(file, path)
        return read_sidecar(prefix)

    def begin(self, prefixes: Sequence[Path], *, overwrite: bool) -> None:
        """Checks that datasets may be written, before the work begins.

        Raises:
            UserError: One exists and ``overwrite`` is not set.
            RemoteError: The store cannot be written.
        """
        (self.folder / _UPLOADED).unlink(missing_ok=True)
        for prefix in prefixes:
            url = self._url_of(idx_path(prefix))
            if not overwrite and remote.stat(url) is not None:
                raise UserError(f"output exists: {url}: choose another prefix or use --overwrite")
        probe = f"{self._url}.partial"
        remote.write_bytes(probe, b"")
        remote.remove([probe])

    def fetch(self, pattern: str) -> None:
        """Copies files of earlier jobs next to the output, unless they are there already."""
        for file in remote.find(f"{self._parent}/{pattern}"):
            path = self.folder / file.url.rpartition("/")[2]
            if not path.exists():
                remote.download(file, path)

    def remove_remote(self, pattern: str) -> None:
        """Removes files of earlier jobs from the store."""
        remote.remove([file.url for file in remote.find(f"{self._parent}/{pattern}")])

    def publish(self, outputs: Sequence[Sequence[Path]], *, overwrite: bool) -> None:
        """Uploads the datasets. The `.idx`, which makes a dataset visible, is the last of each.

        Existing files are removed first, so that new and old ones never coexist.

        Args:
            outputs: The paths of each dataset, as `output.dataset_paths` returns them.
            overwrite: Whether datasets may be replaced. Another job may have written one meanwhile.

        Raises:
            UserError: One exists and ``overwrite`` is not set.
            RemoteError: An upload failed. The next attempt continues with the same file.
        """
        record = self.folder / _UPLOADED
        if not record.exists():
            indexes = [self._url_of(index) for index, *_ in outputs]
            found = [] if overwrite else [url for url in indexes if remote.stat(url) is not None]
            if found:
                raise UserError(
                    f"output exists: {found[0]}: another job has written it meanwhile; use "
                    f"--overwrite to replace it (the finished output is kept in {self.folder})"
                )
            remote.remove(indexes)  # without them, the other files are no dataset
            remote.remove([self._url_of(path) for _, *paths in outputs for path in paths])
            write_atomically(record, "")
        done = record.read_text(encoding="utf-8").splitlines()
        ordered: list[Path] = []
        for _, bin_file, sidecar, *others in outputs:
            ordered += [*others, bin_file, sidecar]
        ordered += [index for index, *_ in outputs]
        for path in ordered:
            if path.name in done or not path.exists():
                continue
            try:
                remote.upload(path, self._url_of(path))
            except remote.RemoteError as error:
                raise remote.RemoteError(
                    f"{error} (the finished output is kept in {self.folder})"
                ) from error
            done.append(path.name)
            write_atomically(record, "".join(f"{name}\n" for name in done))
            logger.info("uploaded %s", self._url_of(path))

    def _url_of(self, path: Path) -> str:
        return f"{self._parent}/{path.name}"
