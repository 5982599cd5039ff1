"""Fails a unit test that starts a process.

Such tests belong in ``tests/commands`` or ``tests/distributed``, so that ``make test-fast`` stays
fast. An audit hook sees every start, whichever library makes it.
"""

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest

# Files whose code starts quick programs: lm-eval records the environment, plots ask for fonts.
_QUICK = ("torch/utils/collect_env.py", "lm_eval/loggers/utils.py", "report/plots.py")
_STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.exec")
_started: list[str] | None = None  # while a test runs that must not start processes


def _see(event: str, arguments: tuple[Any, ...]) -> None:
    if _started is None or event not in _STARTS:
        return
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.endswith(_QUICK):
            return
        frame = frame.f_back
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
