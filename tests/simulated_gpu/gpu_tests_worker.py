"""Runs ``tests/gpu`` on a simulated GPU, in this process.

``python gpu_tests_worker.py LIBRARY RESULT.json``. There are no values on the GPU, so a test runs
until a comparison of numbers fails. The result maps every test to ``passed``, ``compared`` (it
ended at such a comparison), ``skipped`` or ``failed``, and a reason.
"""

import ctypes
import sys

LIBRARY = ctypes.CDLL(sys.argv[1])  # before torch, see `device.install`

import contextlib  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Generator  # noqa: E402
from itertools import product  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402

from megatron_chatflow.simulate import libraries  # noqa: E402
from megatron_chatflow.simulate.device import GPUS, install  # noqa: E402
from megatron_chatflow.simulate.mode import SimulatedGpu  # noqa: E402
from megatron_chatflow.simulate.process_group import join  # noqa: E402
from megatron_chatflow.simulate.recorder import Recorder  # noqa: E402

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))
import step_worker  # noqa: E402

LEFT_OUT = {
    "test_softmax": "calls compiled kernels",
    "test_the_same_input_gives_the_same_bits": "calls compiled kernels",
    "test_kernels_run_on_the_current_stream": "keeps a GPU busy",
}
PACKAGE = str(TESTS.with_name("megatron_chatflow"))


class Results:
    """A plugin that keeps what became of every test."""

    def __init__(self) -> None:
        self.outcomes: dict[str, tuple[str, str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.name.partition("[")[0] not in LEFT_OUT]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, Any, None]:
        report = (yield).get_result()
        name = item.nodeid.rpartition("/")[2]
        if report.skipped:
            self.outcomes[name] = "skipped", str(report.longrepr)
        elif report.failed:
            assert call.excinfo is not None
            error = call.excinfo.value
            frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
            is_comparison = isinstance(error, AssertionError) and not any(
                frame.startswith(PACKAGE) or "/megatron/core/" in frame for frame in frames
            )
            lines = str(error).strip().splitlines() or [""]
            outcome = "compared" if is_comparison else "failed"
            self.outcomes[name] = outcome, f"{type(error).__name__}: {lines[0]}"
            if not is_comparison:
                traceback.print_exception(error)
        elif report.when == "call":
            self.outcomes[name] = "passed", ""


def simulated_steps(dtype: str, micro_batch_size: int, model: str = "{}") -> dict[str, Any]:
    """Runs `step_worker` in a fork, because it initializes megatron-core's global state."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        output = io.StringIO()
        status = 1
        try:
            with contextlib.redirect_stdout(output):
                step_worker.main(dtype, micro_batch_size, json.loads(model))
            os.write(writing, output.getvalue().splitlines()[-1].encode())
            status = 0
        finally:
            if status:
                traceback.print_exc()
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as results:
        text = results.read()
    os.waitpid(child, 0)
    result: dict[str, Any] = json.loads(text or "{}")
    return result


def replace_steps() -> None:
    """Replaces `step_worker.take_steps`.

    A CPU's numbers would be compared with made-up ones, so there are none. The steps run before
    all tests: autograd cannot be used in a fork after it was used.
    """
    keys = [(*key, "{}") for key in product(("fp32", "bf16"), (1, 2))]
    keys += [("bf16", 2, model) for model in step_worker.ARCHITECTURES]
    steps = {key: simulated_steps(*key) for key in keys}
    none = dict.fromkeys(("losses", "norms"), [0.0] * step_worker.NUM_STEPS)
    module: Any = step_worker
    module.take_steps = lambda dtype, *, on_gpu, micro_batch_size=2, model="{}": (
        steps[dtype, micro_batch_size, model] if on_gpu else none
    )


def main() -> None:
    recorder = Recorder()
    install(GPUS["h100"], recorder, LIBRARY)
    libraries.install(GPUS["h100"])
    join(0, 1)
    results = Results()
    with SimulatedGpu(recorder):
        replace_steps()
        arguments = [str(TESTS / "gpu"), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        pytest.main(arguments, plugins=[results])
    Path(sys.argv[2]).write_text(json.dumps(results.outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
