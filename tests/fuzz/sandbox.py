"""Runs a function in a forked process with limits on memory, time and output.

Importing torch takes seconds, so the fuzzer imports everything once and forks for each case. The
parent must have no threads: `fuzz.__main__` sets the thread counts before anything is imported.
"""

import faulthandler
import gc
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_chatflow.training.callbacks.process import return_freed_memory

STDOUT, STDERR = "stdout.txt", "stderr.txt"
_MOST_SHOWN = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Resource limits of one case.

    Attributes:
        cpu_seconds: Processor time of each of its processes.
        wall_seconds: Time after which all of its processes are killed.
        memory_bytes: Peak resident memory above that at the start of the process.
        address_bytes: Address space above that at the start of the process. Protects the machine.
        file_bytes: Size of each file that it writes.
    """

    cpu_seconds: int = 20
    wall_seconds: float = 120
    memory_bytes: int = 2 << 30
    address_bytes: int = 5 << 30
    file_bytes: int = 512 << 20


@dataclass(frozen=True)
class Outcome:
    """Describes how a process ended.

    Attributes:
        status: Exit status, negative for the signal that ended the process.
        stdout: Standard output, at most 1 MiB of it.
        stderr: Standard error, at most 1 MiB of it.
        memory_bytes: Peak resident memory above that at its start.
        cpu_seconds: Processor time of the process and of the children that it waited for.
        is_late: Whether it was killed at its wall clock limit.
    """

    status: int
    stdout: str
    stderr: str
    memory_bytes: int
    cpu_seconds: float
    is_late: bool


def run_limited(
    target: Callable[[], object], folder: Path, logs: Path, limits: Limits | None = None
) -> Outcome:
    """Runs a function in a forked process.

    Args:
        target: The function. Its result is the exit status if it is an integer.
        folder: Working folder of the process.
        logs: Folder for its two output streams.
        limits: Resource limits.

    Returns:
        How it ended.
    """
    limits = limits or Limits()
    logs.mkdir(parents=True, exist_ok=True)
    # Freed memory that malloc keeps is already resident: a child could use it unmeasured.
    return_freed_memory()
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        # Pages of mapped files are not copied, so the child starts with less than its parent has.
        resident, address = _memory_bytes()
        os.write(writer, b"%d" % resident)
        os.close(reader)
        os.close(writer)
        _run_child(target, folder, logs, limits, address)
    os.close(writer)
    with open(reader, "rb") as pipe:
        resident = int(pipe.read(32))
    status, usage, is_late = _wait(process, limits.wall_seconds)
    return Outcome(
        status=os.waitstatus_to_exitcode(status),
        stdout=_read(logs / STDOUT),
        stderr=_read(logs / STDERR),
        memory_bytes=max(0, usage.ru_maxrss * 1024 - resident),
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        is_late=is_late,
    )


def _memory_bytes() -> tuple[int, int]:
    """Returns resident memory and address space of this process, in bytes."""
    pages = [int(field) for field in Path("/proc/self/statm").read_text().split()]
    return pages[1] * resource.getpagesize(), pages[0] * resource.getpagesize()


def _run_child(
    target: Callable[[], object], folder: Path, logs: Path, limits: Limits, address: int
) -> None:
    """Does everything that the forked process does. Does not return."""
    status = 1
    try:
        os.setsid()
        for descriptor, path, flags in (
            (0, Path(os.devnull), os.O_RDONLY),
            (1, logs / STDOUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
            (2, logs / STDERR, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        ):
            os.dup2(os.open(path, flags, 0o644), descriptor)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        os.chdir(folder)
        gc.freeze()
        faulthandler.enable(2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_seconds, limits.cpu_seconds + 5))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_bytes, limits.file_bytes))
        resource.setrlimit(resource.RLIMIT_AS, (address + limits.address_bytes,) * 2)
        result = target()
        status = result if isinstance(result, int) else 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def _wait(process: int, seconds: float) -> tuple[int, resource.struct_rusage, bool]:
    """Waits for a process, then ends all remaining processes of its session."""
    deadline, is_late, pause = time.monotonic() + seconds, False, 0.001
    while True:
        found, status, usage = os.wait4(process, 0 if is_late else os.WNOHANG)
        if found:
            break
        if time.monotonic() >= deadline:
            is_late = True
            _kill_session(process)
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    _kill_session(process)
    return status, usage, is_late


def _kill_session(process: int) -> None:
    try:
        os.killpg(process, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def _read(path: Path) -> str:
    with open(path, "rb") as file:
        return file.read(_MOST_SHOWN).decode("utf-8", "replace")
