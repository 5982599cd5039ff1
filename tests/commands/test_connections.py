"""Tests CUDA_DEVICE_MAX_CONNECTIONS, which tensor parallelism needs on some GPU architectures.

One of three functions, compiled here from their documented declarations, replaces the driver's
library. The package's own code loads and calls it, in a separate process.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LIBRARY = """
int nvmlInit_v2(void) { return %(init)d; }
int nvmlShutdown(void) { return 0; }
static int gpu;
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void** device) {
    *device = &gpu;
    return index != 0;
}
int nvmlDeviceGetCudaComputeCapability(void* device, int* major, int* minor) {
    *major = %(major)d;
    *minor = 0;
    return device != &gpu;
}
"""
SET = """
import os
from megatron_chatflow.runtime.launch import limit_cuda_connections
limit_cuda_connections()
print(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"))
"""


def variable(tmp_path: Path, given: str | None, **driver: int) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_DEVICE_MAX_CONNECTIONS"}
    if given is not None:
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = given
    if driver:
        (tmp_path / "driver.c").write_text(LIBRARY % driver)
        compiler = shutil.which("cc") or "gcc"
        output = tmp_path / "libnvidia-ml.so.1"
        subprocess.run(
            [compiler, "-shared", "-fPIC", tmp_path / "driver.c", "-o", output], check=True
        )
        environment["LD_LIBRARY_PATH"] = str(tmp_path)
    process = subprocess.run(
        [sys.executable, "-c", SET], env=environment, capture_output=True, text=True, check=True
    )
    return process.stdout.strip()


@pytest.mark.parametrize(
    ("driver", "given", "expected"),
    [
        ({"init": 0, "major": 9}, None, "1"),
        ({"init": 0, "major": 9}, "8", "8"),
        ({"init": 0, "major": 10}, None, "None"),
        ({"init": 1, "major": 9}, None, "None"),
    ],
)
def test_one_connection_before_sm_100(
    tmp_path: Path, driver: dict[str, int], given: str | None, expected: str
) -> None:
    assert variable(tmp_path, given, **driver) == expected
