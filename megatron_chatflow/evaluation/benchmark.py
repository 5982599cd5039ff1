"""The harness that every benchmark runs in: arguments, machine, versions, JSON and a table.

In: a module ``benchmark_<name>`` of this package, which measures and says nothing. Out: its rows as
a table, and as JSON with what they were measured on, so that two files can be compared.
"""

import argparse
import contextlib
import importlib
import importlib.util
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

# Where a subject's benchmark lies if not here: with what it measures.
_MODULES = {
    "checkpoint": "megatron_chatflow.train.benchmark_checkpoint",
    "kernels": "megatron_chatflow.train.benchmark_kernels",
    "train": "megatron_chatflow.train.benchmark",
}

_PACKAGES = (
    ("megatron-chatflow", "torch", "megatron-core", "numpy", "sentencepiece", "tokenizers")
    + ("transformers", "transformer-engine", "flash-attn", "flash-attn-3", "flash-attn-4", "apex")
    + ("liger-kernel", "gigatoken", "kitoken")
)


class Benchmark(Protocol):
    """What a benchmark's module offers; one with ``summary(rows)`` adds its keys to the JSON."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds what can be chosen; ``--peers`` and ``--output`` are there already."""

    def run(self, arguments: argparse.Namespace) -> Sequence[Row]:
        """Measures; with ``arguments.peers`` set, the installed peers too, in the same run.

        Returns:
            A row for each thing measured: text columns say what, numeric ones end in their unit
            (``samples_per_second``, ``rss_bytes``).
        """


def _module_name(name: str) -> str:
    return _MODULES.get(name, f"{__package__}.benchmark_{name}")


def has_benchmark(name: str) -> bool:
    """Whether there is a module ``benchmark_<name>``; it is not imported."""
    return importlib.util.find_spec(_module_name(name)) is not None


def load_benchmark(name: str) -> Benchmark:
    """The module ``benchmark_<name>``."""
    module: Any = importlib.import_module(_module_name(name))
    benchmark: Benchmark = module
    return benchmark


def machine() -> dict[str, Any]:
    """What the measurement ran on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "cpu": cpu,
        "num_cores": len(os.sched_getaffinity(0)),
        "num_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(k) for k in range(num_gpus)],
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Versions of Python, of the package, and of what it or its peers rest on, where installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def commit() -> str | None:
    """The commit of the working tree that the package lies in, ``+`` behind it if it was changed.

    Outside a working tree it is what ``MEGATRON_CHATFLOW_COMMIT`` says. None without either, or
    where git is missing.
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
            if key != "output" and not isinstance(value, Path)  # whose names say nothing elsewhere
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
        name: The subcommand.
        benchmark: What measures.
        command_line: The arguments behind the subcommand.
        prog: How the program was called, for ``--help``.

    Returns:
        The report, as ``--output`` holds it.

    Raises:
        UserError: An argument is wrong, or the report cannot be written there.
    """
    parser = ArgumentParser(
        prog=f"{prog} {name}", description=(benchmark.__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--peers", action="store_true", help="measure installed peers beside ours")
    parser.add_argument("--output", type=Path, metavar="R.json", help="where the report goes")
    benchmark.add_arguments(parser)
    arguments = parser.parse_args(list(command_line))
    with contextlib.ExitStack() as stack:
        # Opened before anything is measured: a mistyped path costs nothing.
        # Under torchrun the first process reports.
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
