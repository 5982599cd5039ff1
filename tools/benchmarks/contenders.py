"""Command lines that tokenize a corpus into an indexed dataset, and their cost.

A `Contender` is run as a process of its own. Its `Usage` counts wall and CPU seconds and the peak
memory of the whole process tree.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_chatflow.errors import UserError

OURS, STANDARD, FAST = "megatron_chatflow", "preprocess_data.py", "preprocess_data_fast.py"
SENTENCEPIECE = "sentencepiece"
_SAMPLE_SECONDS = 0.1
# Arguments common to all three tools.
_COMMON: tuple[str, ...] = ("--input", "{input}", "--output-prefix", "{prefix}", "--append-eod")

# The cost of sentencepiece in Python alone: parse, encode and write the ids, on one core.
_SENTENCEPIECE_LOOP = """
import json, sys
import numpy as np
import sentencepiece
model, source, target, eod = sys.argv[1:]
processor = sentencepiece.SentencePieceProcessor(model_file=model)
with open(source, encoding="utf-8") as lines, open(target, "wb") as ids:
    for line in lines:
        found = processor.encode(json.loads(line)["text"])
        ids.write(np.array([*found, int(eod)] if found else found, np.int32).tobytes())
"""


@dataclass(frozen=True)
class Usage:
    """Cost of a job.

    Attributes:
        seconds: Wall time.
        cpu_seconds: User and system time of the job and its child processes.
        rss_bytes: Peak of the summed resident sets. Shared pages count once per process.
        pss_bytes: Peak of the summed proportional sets. Shared pages count once.
    """

    seconds: float
    cpu_seconds: float
    rss_bytes: int
    pss_bytes: int


@dataclass(frozen=True)
class Contender:
    """A program that does the job.

    Attributes:
        name: Name of the program.
        num_workers: Number of workers it is given; None if it has no such setting.
        arguments: Arguments of the interpreter, with `{input}` and `{prefix}` for the paths.
        python: Path of the interpreter.
        environment: Variables added to the environment of this process.
        folder: Working directory.
    """

    name: str
    num_workers: int | None
    arguments: tuple[str, ...]
    python: str = sys.executable
    environment: tuple[tuple[str, str], ...] = ()
    folder: Path | None = None

    def run(self, source: Path, prefix: Path) -> Usage:
        """Runs the job once.

        Raises:
            UserError: The program failed.
        """
        paths = {"{input}": str(source), "{prefix}": str(prefix)}
        command = [self.python, *(paths.get(part, part) for part in self.arguments)]
        return measure_job(command, {**os.environ, **dict(self.environment)}, self.folder)


def our_tool(model: Path, num_workers: int) -> Contender:
    """Returns this project's ``preprocess_data.py``."""
    tool = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
    if not tool.exists():
        raise UserError(f"{tool}: not found; run the benchmark from a source checkout")
    arguments: tuple[str, ...] = (
        "--input",
        "{input}",
        "--output-prefix",
        "{prefix}",
        "--append-eod",
    )
    arguments += ("--tokenizer-model", str(model), "--workers", str(num_workers), "--overwrite")
    return Contender(OURS, num_workers, (str(tool), *arguments))


def megatron_tool(
    checkout: Path, python: str, model: Path, tokenizer_type: str, num_workers: int
) -> Contender:
    """Returns Megatron-LM's ``preprocess_data.py`` with the same model."""
    arguments: tuple[str, ...] = (
        "--input",
        "{input}",
        "--output-prefix",
        "{prefix}",
        "--append-eod",
    )
    arguments += ("--tokenizer-type", tokenizer_type, "--tokenizer-model", str(model))
    arguments += ("--workers", str(num_workers), "--log-interval", "1000000")
    return _of_checkout(STANDARD, num_workers, checkout, python, arguments)


def megatron_fast_tool(checkout: Path, python: str, folder: Path) -> Contender:
    """Returns Megatron-LM's `preprocess_data_fast.py`, which uses every available core.

    Args:
        checkout: Checkout of Megatron-LM.
        python: Path of the interpreter.
        folder: Folder of the model for transformers, the only format that the script reads.
    """
    arguments: tuple[str, ...] = (
        "--input",
        "{input}",
        "--output-prefix",
        "{prefix}",
        "--append-eod",
    )
    arguments += ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder))
    return _of_checkout(FAST, None, checkout, python, (*arguments, "--use-gigatoken"))


def sentencepiece_loop(model: Path, eod_id: int) -> Contender:
    """Returns a loop over the library that writes a file of int32 ids to `{prefix}`."""
    arguments = ("-c", _SENTENCEPIECE_LOOP, str(model), "{input}", "{prefix}", str(eod_id))
    return Contender(SENTENCEPIECE, 1, arguments)


def _of_checkout(
    name: str, num_workers: int | None, checkout: Path, python: str, arguments: tuple[str, ...]
) -> Contender:
    script = checkout / "tools" / name
    if not script.exists():
        raise UserError(
            f"--megatron-path: {checkout} has no tools/{name}; give the root of a checkout"
        )
    # Takes precedence over an installed megatron-core, which may differ in version from the script.
    path = os.pathsep.join([str(checkout.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = (("PYTHONPATH", path), ("CUDA_DEVICE_MAX_CONNECTIONS", "1"))
    return Contender(
        *(name, num_workers, (str(script.resolve()), *arguments), python, environment),
        folder=checkout,
    )


def measure_job(
    command: Sequence[str], environment: Mapping[str, str], folder: Path | None = None
) -> Usage:
    """Runs a command and measures its cost.

    Raises:
        UserError: The command cannot be started, or failed.
    """
    begin = time.perf_counter()
    try:
        process = subprocess.Popen(
            *(command,), env=dict(environment), cwd=folder, stderr=subprocess.PIPE, stdout=-3
        )
    except OSError as error:
        raise UserError(f"{command[0]}: cannot be started ({error.strerror})") from error
    memory = _Memory(process.pid)
    memory.start()
    assert process.stderr is not None
    errors = process.stderr.read().decode(errors="replace")  # until every writer has ended
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    memory.stop()
    if process.returncode:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"{' '.join(command[:2])}: failed with exit code {process.returncode}: {last}"
        )
    return Usage(seconds, usage.ru_utime + usage.ru_stime, memory.rss_bytes, memory.pss_bytes)


class _Memory(threading.Thread):
    """Samples the memory of a process tree until it is stopped.

    Attributes:
        rss_bytes: The largest sum of resident sets so far.
        pss_bytes: The largest sum of proportional sets so far.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.rss_bytes = self.pss_bytes = 0
        self._root = psutil.Process(pid)
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            try:
                tree = [self._root, *self._root.children(recursive=True)]
            except psutil.Error:
                return
            sizes = [_sizes_of(process.pid) for process in tree]
            self.rss_bytes = max(self.rss_bytes, sum(rss for rss, _ in sizes))
            self.pss_bytes = max(self.pss_bytes, sum(pss for _, pss in sizes))

    def stop(self) -> None:
        self._ended.set()
        self.join()


def _sizes_of(pid: int) -> tuple[int, int]:
    """Returns resident and proportional set in bytes; zeros if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {line.split()[0]: int(line.split()[1]) << 10 for line in lines[1:]}
    return sizes.get("Rss:", 0), sizes.get("Pss:", 0)
