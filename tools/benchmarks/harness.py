"""Runs one benchmark: parses its arguments, prints its rows as a table and writes them as JSON.

The JSON report also holds the arguments, the machine, package versions and the commit, so that two
reports can be compared.
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

from megatron_chatflow.errors import ArgumentParser, UserError
from megatron_chatflow.files import StagedFile, check_output_file, publish_all
from megatron_chatflow.runtime.table import Row, format_table

FORMAT_VERSION = 1

_PACKAGES = (
    ("megatron-chatflow", "torch", "megatron-core", "numpy", "sentencepiece", "tokenizers")
    + ("transformers", "transformer-engine", "flash-attn", "flash-attn-3", "flash-attn-4", "apex")
    + ("gigatoken", "kitoken")
)


class Benchmark(Protocol):
    """The interface of a benchmark module.

    A module may also define ``summary(rows)``, whose dict is merged into the JSON report.
    """

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the benchmark's own flags; ``--peers`` and ``--output`` are already defined."""

    def run(self, arguments: argparse.Namespace) -> Sequence[Row]:
        """Runs the measurement, including the installed peers if ``arguments.peers`` is set.

        Returns:
            One row per measurement. Text columns identify it; names of numeric columns end in
            their unit (``samples_per_second``, ``rss_bytes``).
        """


def load_benchmark(name: str) -> Benchmark:
    """Imports the module of a subject."""
    module: Any = importlib.import_module(f"{__package__}.{name}")
    benchmark: Benchmark = module
    return benchmark


def machine() -> dict[str, Any]:
    """Describes the machine: CPU, cores, threads, memory, GPUs and operating system."""
    # Not platform.processor() or platform.platform(): Python 3.11 starts a process in them.
    cpu = platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    system = os.uname()
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "cpu": cpu,
        "num_cores": len(os.sched_getaffinity(0)),
        "num_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(k) for k in range(num_gpus)],
        "system": f"{system.sysname}-{system.release}-{system.machine}",
    }


def versions() -> dict[str, str]:
    """Returns the versions of Python, the package, its dependencies and the installed peers."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def commit() -> str | None:
    """Returns the commit of the working tree, with ``+`` appended if tracked files were changed.

    Outside of a git working tree the environment variable ``MEGATRON_CHATFLOW_COMMIT`` is
    returned, or None if it is unset. None is also returned if git is not installed.
    """
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return os.environ.get("MEGATRON_CHATFLOW_COMMIT")
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        )
    except OSError:
        return None
    if head.returncode or changes.returncode:
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def _report(name: str, arguments: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "benchmark": name,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "arguments": {
            key: value if isinstance(value, int | float | str | None) else str(value)
            for key, value in arguments.items()
            if key != "output" and not isinstance(value, Path)  # paths differ between machines
        },
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "rows": [dict(row) for row in rows],
    }


def run_benchmark(
    name: str, benchmark: Benchmark, command_line: Sequence[str], *, prog: str
) -> dict[str, Any]:
    """Runs one benchmark, prints its table and writes its report.

    Args:
        name: The subject.
        benchmark: The module of the subject.
        command_line: The arguments after the subject.
        prog: The program name shown by ``--help``.

    Returns:
        The report, as written to ``--output``.

    Raises:
        UserError: An argument is invalid, or the report cannot be written.
    """
    parser = ArgumentParser(
        prog=f"{prog} {name}", description=(benchmark.__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--peers", action="store_true", help="also measure installed peer libraries"
    )
    parser.add_argument("--output", type=Path, metavar="R.json", help="file to write the report to")
    benchmark.add_arguments(parser)
    arguments = parser.parse_args(list(command_line))
    with contextlib.ExitStack() as stack:
        # The file is opened before the measurement, so that a mistyped path fails at once.
        # Under torchrun only the first process writes the report.
        is_first = os.environ.get("RANK", "0") == "0"
        has_file = arguments.output is not None and is_first
        if has_file:
            check_output_file(arguments.output)
        file = stack.enter_context(StagedFile(arguments.output)) if has_file else None
        rows = benchmark.run(arguments)
        if not rows:
            raise UserError(f"{name}: nothing was measured; see {prog} {name} --help")
        report = _report(name, vars(arguments), rows)
        if hasattr(benchmark, "summary"):
            report.update(benchmark.summary(rows))
        print(format_table(rows), flush=True)
        if file is not None:
            file.write(json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")
            publish_all([file])
            print(f"wrote {arguments.output}", file=sys.stderr)
    return report
