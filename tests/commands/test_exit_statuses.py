"""Tests the exit statuses of real programs after a user error and after a closed output pipe."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_program(body: str, stdout: int) -> tuple[int, str]:
    """Runs ``def main(): body`` and returns its exit status and standard error."""
    program = f"from megatron_chatflow.errors import *\ndef main():\n    {body}\nrun_main(main)\n"
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    return done.returncode, done.stderr


@pytest.fixture
def unread() -> Iterator[int]:
    """Returns a pipe whose reading end is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize(
    "body",
    [
        "print('buffered until the end')",
        "print('at once', flush=True)",
        "for i in range(100000): print(i)",
        "print('a help text'); raise SystemExit(0)",
    ],
)
def test_output_that_nobody_reads_is_no_error(body: str, unread: int) -> None:
    assert run_program(body, unread) == (141, "")


def test_other_broken_pipes_keep_their_traceback() -> None:
    status, complaint = run_program("raise BrokenPipeError('of a worker')", subprocess.PIPE)
    assert status == 1
    assert "Traceback" in complaint and "of a worker" in complaint


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize(
    "body", ["print('buffered until the end')", "for i in range(100000): print(i)"]
)
def test_output_to_a_full_disk_is_one_line(body: str) -> None:
    with open("/dev/full", "w") as full:
        status, complaint = run_program(body, full.fileno())
    assert status == 2
    assert complaint == (
        "error: cannot write: the output or a temporary file: No space left on device; "
        "free some space\n"
    )


def test_mistakes_are_one_line() -> None:
    done = run_program("raise UserError('flag: is\\n   wrong')", subprocess.PIPE)
    assert done == (2, "error: flag: is wrong\n")
    assert run_program("raise KeyboardInterrupt", subprocess.PIPE) == (130, "interrupted\n")
    assert run_program("return 3", subprocess.PIPE) == (3, "")


def test_programs_raise_the_limit_on_open_files() -> None:
    body = "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    program = f"from megatron_chatflow.errors import *\ndef main():\n    {body}\nrun_main(main)\n"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512)),
    )
    assert done.stdout == "(512, 512)\n", done.stderr


INTERRUPTING_SITE = """
import os, signal, sys
def before(event, arguments):
    if event == "import" and arguments[0].startswith(("megatron_chatflow.", "examples.")):
        if arguments[0] != "megatron_chatflow.errors":
            os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(before)
"""

PROGRAMS = sorted([*(ROOT / "tools").glob("*.py"), *(ROOT / "examples").glob("*/demo.py")])


@pytest.mark.parametrize("path", [*PROGRAMS, None], ids=lambda path: path.stem if path else "train")
def test_ctrl_c_during_imports_is_one_line(tmp_path: Path, path: Path | None) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTING_SITE)
    command = [str(path)] if path else ["-m", "megatron_chatflow.pretrain"]
    python_path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *command, "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": python_path},
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_after_the_imports_cleans_up() -> None:
    body = (
        "import signal, time\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        print('cleaned up', file=sys.stderr)\n"
        "exit_on_interrupt()"
    )
    assert run_program(body, subprocess.PIPE) == (130, "cleaned up\ninterrupted\n")
