"""Simulates ranks on request, each in a fork of this process, which has imported everything.

Every line of standard input is a JSON object with the arguments of
`megatron_chatflow.simulate.worker.execute`, ``result`` and ``log`` (paths), ``arguments`` (further
ones of the entry point) and ``mutation`` (a function of `mutations`, or null). A line of standard
output answers when the result is there.
"""

import ctypes
import sys

ctypes.CDLL(sys.argv[1])  # before torch, see `shim.loaded_library`

import json  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import mutations  # noqa: E402
import torch  # noqa: E402

from megatron_chatflow.simulate.worker import execute, run_in_fork  # noqa: E402


def serve() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        case: dict[str, Any] = json.loads(line)
        result, log, mutation = case.pop("result"), case.pop("log"), case.pop("mutation")

        def work(case: dict[str, Any] = case, mutation: str | None = mutation) -> Any:
            if mutation is not None:
                getattr(mutations, mutation)()
            return execute(**case)

        run_in_fork(work, Path(result), Path(log))
        print("done", flush=True)


if __name__ == "__main__":
    serve()
