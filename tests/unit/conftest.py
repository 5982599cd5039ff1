"""Fails a unit test that starts a process.

Such tests belong in ``tests/commands`` or ``tests/distributed``, so that ``make test-fast`` stays
fast. An audit hook sees every start. Those that a library makes by itself, such as lm-eval's
questions about the environment, do not count.
"""

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
OWN = tuple(str(ROOT / folder) for folder in ("megatron_chatflow", "tests", "tools", "examples"))
QUICK = str(ROOT / "megatron_chatflow" / "report" / "plots.py")  # asks for the installed fonts
STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]
STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.exec")
_started: list[str] | None = None  # while a test runs that must not start processes


def _see(event: str, arguments: tuple[Any, ...]) -> None:
    if _started is None or event not in STARTS:
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        is_standard = file.startswith(STANDARD_LIBRARY) and "site-packages" not in file
        if not is_standard and not file.startswith("<"):
            break
        frame = frame.f_back
    caller = "" if frame is None else frame.f_code.co_filename
    if caller.startswith(OWN) and caller != QUICK:
        _started.append(f"{event} {arguments[:2]}")


sys.addaudithook(_see)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Begins before the fixtures of the test, whatever their scope."""
    global _started
    _started = []


@pytest.fixture(autouse=True)
def _starts_no_process() -> Iterator[None]:
    global _started
    yield
    started, _started = _started, None
    assert not started, f"a unit test starts a process: {started[0]}; move it to tests/commands"
