"""Tests programs whose files may not grow beyond a limit, as on a full disk."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_chatflow.errors import UserError
from megatron_chatflow.files import (
    new_folder,
    write_output_file,
)
from megatron_chatflow.tokenizer.small_files import write_small_files

FULL = """
import logging, resource, sys
from pathlib import Path
from megatron_chatflow.training.callbacks.isolated import IsolatedCallback
from megatron_chatflow.training.callbacks.scalars import TensorBoard
logging.basicConfig(level=logging.WARNING)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
callback = IsolatedCallback(lambda: TensorBoard(Path(sys.argv[1]), iteration=0))
for k in range(2000):
    callback.on_choice(k, {"x": {"accuracy": 0.5}})
callback.close()
print("trained to the end")
"""


def test_a_full_disk_under_tensorboard(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "trained to the end" in done.stdout, done.stderr
    assert "training continues without it" in done.stderr


def write_folder(path: Path, content: bytes) -> None:
    with new_folder(path, overwrite=True, mark="a", num_bytes=0) as folder:
        (folder / "a").write_bytes(content)


WRITERS: dict[str, Callable[[Path, bytes], None]] = {
    "file": write_output_file,
    "small files": lambda path, content: write_small_files(path.parent, {path.name: content}),
    "folder": write_folder,
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mounts a file system of 64 KiB, or skips the test if mounting is not permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"this user may not mount a tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_what_was_there_and_nothing_else(disk: Path, name: str) -> None:
    WRITERS[name](disk / "output", b"old")
    before = {path: path.is_dir() or path.read_bytes() for path in disk.rglob("*")}
    with pytest.raises(UserError, match="(?i)no space left"):
        WRITERS[name](disk / "output", bytes(1 << 17))
    assert {path: path.is_dir() or path.read_bytes() for path in disk.rglob("*")} == before
    WRITERS[name](disk / "output", b"new")
