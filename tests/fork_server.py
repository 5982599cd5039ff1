"""Runs programs in forks of a process that has already imported torch and megatron-core.

The imports take about four CPU-seconds per process, and a tiny run takes less than one. A forked
program has its own arguments, environment, folder, output, threads and exit status.

Forks share the half a million objects of the imports: the garbage collector leaves them alone, and
a program that ends does not destroy them, which would cost it more than a second.

Use a real process instead to test what a program imports, environment variables that a library
reads when it is imported, or how the interpreter is finalized.

``python fork_server.py serve SOCKET`` is the server. It ends when its standard input is closed.
``python fork_server.py SCRIPT ARGUMENTS...`` lets a launcher such as torchrun start a program: it
runs the program in a fork, passes signals on, and ends with the program's exit status.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Modules that programs run, such as `megatron_chatflow.pretrain`, are not imported here: `runpy`
# warns when it runs a module that has been imported.
PRELOADED = (
    "torch",
    "torch.distributed.run",
    "transformers",
    "megatron_chatflow.runtime.device",
    "megatron_chatflow.runtime.launch",
    "megatron_chatflow.training.loop",
    "megatron_chatflow.training.build",
    "megatron_chatflow.training.start",
    "megatron_chatflow.training.inputs",
    "megatron_chatflow.training.dry_run",
)
# Libraries read these when they are imported, and a fork cannot import them again.
_FIXED = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

# The environment variable with the server's socket, for programs that start programs.
_ADDRESS = "FORK_SERVER"

_PR_SET_PDEATHSIG = 1  # of Linux's prctl.h
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

# By the folder of libraries: the process and its socket.
_servers: dict[Path | None, tuple["subprocess.Popen[bytes]", str]] = {}


def run_forked(
    command: Sequence[object],
    *,
    stdin: str = "",
    num_ranks: int = 1,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    libraries: Path | None = None,
    timeout: float = 300,
    merge_output: bool = False,
) -> "subprocess.CompletedProcess[str]":
    """Runs a Python program, as `subprocess.run` would with captured text output.

    Args:
        command: ``SCRIPT ARGUMENTS...`` or ``-m MODULE ARGUMENTS...``, without the interpreter.
        stdin: Text of the standard input.
        num_ranks: With more than one, starts a process per rank with torchrun's variables. When one
            fails, the others are terminated. All write to the same output.
        environment: Variables in addition to those of this process.
        folder: The working folder. The default is the present one.
        libraries: A folder whose libraries come before all others. They are imported with torch,
            by a server of their own.
        timeout: Seconds after which all processes are killed.
        merge_output: Whether standard error goes to ``stdout`` too.

    Returns:
        ``returncode`` is that of the first rank that failed, or 0.

    Raises:
        subprocess.TimeoutExpired: The program did not end in time.
    """
    command = [str(part) for part in command]
    address = _address(libraries)
    variables = {**os.environ, **_FIXED, _ADDRESS: address, **(environment or {})}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as source,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
    ):
        source.write(stdin)
        source.seek(0)
        streams = [source, output, output if merge_output else errors]
        program = _Program(
            address,
            command,
            variables,
            folder or Path.cwd(),
            [f.fileno() for f in streams],
            num_ranks,
        )
        status = program.wait(timeout)
        output.seek(0)
        errors.seek(0)
        texts = output.read(), errors.read()
    if status is None:
        raise subprocess.TimeoutExpired(command, timeout, *texts)
    return subprocess.CompletedProcess(command, status, *texts)


def run_tool(name: str, *arguments: object, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    """Runs ``tools/name`` in a fork."""
    script = Path(__file__).parents[1] / "tools" / name
    return run_forked([script, *arguments], stdin=stdin, environment={"PYTHONWARNINGS": "ignore"})


class _Program:
    """A program that the server runs for this process, on one or several ranks.

    The processes form a process group. They are killed when this process ends.
    """

    def __init__(
        self,
        address: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        streams: Sequence[int],
        num_ranks: int,
    ) -> None:
        request = {
            "command": command,
            "environment": dict(environment),
            "folder": str(folder),
            "num_ranks": num_ranks,
        }
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(address)
        socket.send_fds(self._connection, [b"\n"], streams)
        self._answers = self._connection.makefile("rw", encoding="utf-8")
        print(json.dumps(request), file=self._answers, flush=True)
        self.group = int(self._answers.readline())

    def wait(self, timeout: float | None = None) -> int | None:
        """Returns the exit status, or None if the program had to be killed after ``timeout``."""
        ended, _, _ = select.select([self._connection], [], [], timeout)
        if not ended:
            os.killpg(self.group, signal.SIGKILL)
        line = self._answers.readline()
        self._answers.close()
        self._connection.close()
        return int(line) if ended else None


def _run_for_launcher(command: Sequence[str]) -> int:
    """Runs a program with the environment, streams and signals of this process.

    Returns:
        The exit status. A signal that ended the program ends this process too.
    """
    # The program ends with the launcher, as a child of the launcher would if it asked for that.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    address = os.environ[_ADDRESS]
    program = _Program(address, command, os.environ, Path.cwd(), [0, 1, 2], num_ranks=1)
    for number in _PASSED_ON:
        signal.signal(number, lambda received, _: os.killpg(program.group, received))
    status = program.wait()
    assert status is not None
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def launcher_environment() -> dict[str, str]:
    """Returns the variables with which a launcher starts this file in place of Python."""
    return {_ADDRESS: _address(), **_FIXED}


def _address(libraries: Path | None = None) -> str:
    """Returns the socket of the server with ``libraries``. Starts it if it does not run."""
    if libraries not in _servers or _servers[libraries][0].poll() is not None:
        folder = tempfile.mkdtemp(prefix="fork_server")
        address = f"{folder}/socket"
        path = [str(libraries)] if libraries else []
        path += filter(None, [os.environ.get("PYTHONPATH")])
        process = subprocess.Popen(
            [sys.executable, __file__, "serve", address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # warnings of the imports
            env={**os.environ, **_FIXED, "PYTHONPATH": os.pathsep.join(path)},
            cwd=Path(__file__).parents[1],
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n", f"{process.args} fails"
        _servers[libraries] = process, address
        atexit.register(_stop, process, Path(folder))
    return _servers[libraries][1]


def _stop(process: "subprocess.Popen[bytes]", folder: Path) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait()
    (folder / "socket").unlink(missing_ok=True)
    folder.rmdir()


def _serve(address: str) -> dict[str, Any] | None:
    """Answers requests until standard input closes.

    Returns:
        In the forked process of a rank, the program that it has to run. In the server, None.
    """
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # The kernel reaps the ended leaders.
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return None
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in _PASSED_ON:  # They are meant for the ranks of the group.
            signal.signal(number, signal.SIG_IGN)
        os.setpgid(0, 0)
        return _lead(connection)


def _lead(connection: socket.socket) -> dict[str, Any]:
    """Starts the ranks of a request, waits for them, reports the exit status and exits.

    Returns:
        The program that the forked process of a rank has to run. The leader exits.
    """
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    answers = connection.makefile("rw", encoding="utf-8")
    request: dict[str, Any] = json.loads(answers.readline())
    print(os.getpid(), file=answers, flush=True)
    ranks: set[int] = set()
    port = _free_port() if request["num_ranks"] > 1 else 0
    for rank in range(request["num_ranks"]):
        if (process := os.fork()) == 0:
            if port:
                request["environment"] |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(request["num_ranks"]),
                    "LOCAL_WORLD_SIZE": str(request["num_ranks"]),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            return {**request, "streams": streams}
        ranks.add(process)
    status = 0
    while ranks:
        process, ended = os.waitpid(-1, os.WNOHANG)
        if process:
            ranks.discard(process)
            code = os.waitstatus_to_exitcode(ended)
            if code != 0 and status == 0:
                status = code
                for other in ranks:
                    os.kill(other, signal.SIGTERM)
        elif select.select([connection], [], [], 0.02)[0]:
            os.killpg(0, signal.SIGKILL)  # The process that asked for the program has ended.
    print(status, file=answers, flush=True)
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _become(program: Mapping[str, Any]) -> None:
    """Runs the program in this process, with its own environment, folder and streams, and exits.

    Raises:
        BaseException: What the program raised, unless it is the request to exit with a number.
    """
    os.environ.clear()
    os.environ.update(program["environment"])
    os.chdir(program["folder"])
    for number, stream in enumerate(program["streams"]):
        os.dup2(stream, number)
        os.close(stream)
    for passed_on in _PASSED_ON:
        signal.signal(passed_on, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _run(program)
        status = 0
    except SystemExit as ended:
        if not isinstance(ended.code, int | None):
            raise
        status = ended.code or 0
    # What Python does at the end of a program, except for destroying all objects.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF)


def _run(program: Mapping[str, Any]) -> None:
    command = program["command"]
    if command[0] == "-m":
        sys.argv = command[1:]
        sys.path[0] = program["folder"]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        sys.path[0] = str(Path(command[0]).resolve().parent)
        runpy.run_path(command[0], run_name="__main__")


def main() -> int:
    """Runs the server, or a program for a launcher. Forked programs run to their end in here."""
    if sys.argv[1] != "serve":
        return _run_for_launcher(sys.argv[1:])
    modules = {name: importlib.import_module(name) for name in PRELOADED}
    torch = modules["torch"]
    # A run measures the peak of its CPU, unless its process has done so before.
    modules["megatron_chatflow.runtime.device"].peak_flops(torch.device("cpu"), torch.float32)
    gc.collect()
    gc.freeze()
    if (program := _serve(sys.argv[2])) is not None:
        _become(program)
    return 0


if __name__ == "__main__":
    sys.exit(main())
