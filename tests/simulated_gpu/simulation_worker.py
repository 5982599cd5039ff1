"""Simulates ranks on request, each in a fork of this process, which has imported everything.

Every line of standard input is a JSON list of ranks that run at the same time. Each is an object
with the arguments of `megatron_chatflow.simulate.worker.execute`, ``result`` and ``log`` (paths)
and ``mutation`` (a function of `mutations`, or null). A line of standard output answers when all
results are there. A rank that fails ends the others, which would wait for it.
"""

import ctypes
import sys

LIBRARY = ctypes.CDLL(sys.argv[1])  # before torch, see `device.install`

import json  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import mutations  # noqa: E402
import torch  # noqa: E402

from megatron_chatflow.simulate.worker import execute, start_fork  # noqa: E402

SECONDS = 300  # within which a job of several ranks must end


def start(case: dict[str, Any]) -> int:
    result, log, mutation = case.pop("result"), case.pop("log"), case.pop("mutation")

    def work() -> Any:
        if case.get("store") is not None:
            signal.alarm(SECONDS)  # a rank may wait for the others
        if mutation is not None:
            getattr(mutations, mutation)()
        return execute(LIBRARY, **case)

    return start_fork(work, Path(result), Path(log))


def serve() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        running = {start(case) for case in json.loads(line)}
        while running:
            child, status = os.wait()
            running.remove(child)
            if status:
                for other in running:
                    os.kill(other, signal.SIGKILL)
        print("done", flush=True)


if __name__ == "__main__":
    serve()
