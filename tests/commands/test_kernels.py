"""Runs the CUDA kernels' sources on the CPU thread by thread, and compiles them with nvcc.

Indices, barriers, reductions, rounding and launch sizes are those of the kernels. `tests/gpu` runs
the same checks on a device.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_checks import DTYPES, check_softmax

from megatron_chatflow.kernels import cross_entropy
from megatron_chatflow.kernels import cuda as cuda_kernels

pytestmark = pytest.mark.native

CSRC = Path(__file__).parents[2] / "csrc" / "kernels"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> cuda_kernels.KernelLibrary:
    path = tmp_path_factory.mktemp("kernels") / "host.so"
    subprocess.run([CSRC / "build.sh", "--host", path], check=True)
    return cuda_kernels.KernelLibrary(path)


@pytest.fixture
def emulated(library: cuda_kernels.KernelLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "load_kernels", lambda: (library, "emulated"))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", DTYPES)
class TestEmulated:
    @pytest.mark.parametrize(
        "size", [(9, 8, 8), (4, 512, 509), (3, 4360, 4357), (6, 64, 0), (5, 128, 1)]
    )
    def test_softmax(self, size: tuple[int, int, int], dtype: torch.dtype) -> None:
        check_softmax(*size, dtype, CPU)

    def test_what_does_not_fit_is_refused(self, dtype: torch.dtype) -> None:
        labels = torch.zeros(1, dtype=torch.int64)
        with pytest.raises(ValueError, match="whole packs"):
            cross_entropy.softmax_statistics_kernel(torch.ones(1, 9, dtype=dtype), labels, 8)
        with pytest.raises(ValueError, match="labels int64"):
            cross_entropy.softmax_statistics_kernel(torch.ones(1, 8, dtype=dtype), labels.int(), 8)

    def test_no_rows_are_no_launch(self, dtype: torch.dtype) -> None:
        logits, labels = torch.ones(0, 8, dtype=dtype), torch.zeros(0, dtype=torch.int64)
        statistics = cross_entropy.softmax_statistics_kernel(logits, labels, 8)
        assert [len(values) for values in statistics] == [0, 0, 0]


def test_a_barrier_that_a_thread_misses_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "broken.cu"
    source.write_text(
        '#include "device.cuh"\n'
        "__global__ void broken() { if (threadIdx.x != 3) __syncthreads(); }\n"
        "CHATFLOW_API int run() { return chatflow::launch(broken, 1, 64, nullptr); }\n"
    )
    compiler = shutil.which("c++") or "g++"
    includes = ["-I", str(CSRC), "-I", str(CSRC / "tests")]
    library = tmp_path / "broken.so"
    options = ["-x", "c++", "-std=c++17", "-shared", "-fPIC"]
    subprocess.run([compiler, *options, *includes, source, "-o", library], check=True)
    assert ctypes.CDLL(str(library)).run() == 719


def test_the_bindings_pass_what_the_header_declares() -> None:
    text = re.sub(r"/\*.*?\*/", "", (CSRC / "kernels.h").read_text(), flags=re.DOTALL)
    kinds = {"void*": "p", "float*": "p", "int64_t*": "p", "int64_t": "n"}
    declared = {}
    for match in re.finditer(r"CHATFLOW_DECLARE\(chatflow_(\w+),([^)]*)\)", text):
        types = [
            part.replace("const ", "").split()[0] for part in match[2].replace("\n", " ").split(",")
        ]
        declared[match[1]] = "".join(kinds[kind] for kind in types)
    assert declared == {name: kinds + "p" for name, kinds in cuda_kernels.SIGNATURES.items()}


@pytest.mark.skipif(shutil.which("nvcc") is None and not os.environ.get("CI"), reason="no nvcc")
def test_nvcc_compiles_every_kernel(tmp_path: Path) -> None:
    path = tmp_path / "kernels.so"
    # A sanitizer runtime that is preloaded for Python must not be loaded into the compiler.
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    subprocess.run([CSRC / "build.sh", path], check=True, env=environment)
    cuda_kernels.KernelLibrary(path)
    code = path.read_bytes()
    for architecture in (b"sm_80", b"sm_90a"):
        assert architecture in code


def test_the_log_says_why_there_are_no_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cuda_kernels.load_kernels.cache_clear()
    monkeypatch.setattr(cuda_kernels, "LIBRARY", tmp_path / "absent.so")
    library, reason = cuda_kernels.load_kernels()
    assert library is None and "MEGATRON_CHATFLOW_CUDA=1" in reason
    with pytest.raises(RuntimeError, match="not built"):
        cuda_kernels.kernels()
    cuda_kernels.load_kernels.cache_clear()
    (tmp_path / "absent.so").write_bytes(b"not a library")
    assert "build it anew" in cuda_kernels.load_kernels()[1]
    cuda_kernels.load_kernels.cache_clear()


@pytest.mark.parametrize(
    ("wanted", "message"), [("1", "install the CUDA toolkit"), ("yes", "set it to 0 or 1")]
)
def test_kernels_that_cannot_be_built_are_an_error(wanted: str, message: str) -> None:
    environment = {**os.environ, "MEGATRON_CHATFLOW_CUDA": wanted, "NVCC": "/nowhere/nvcc"}
    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=CSRC.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode == 1 and message in build.stderr


@pytest.mark.parametrize("command", ["build_ext", "build_py"])
def test_a_build_without_pybind11_is_an_error(command: str) -> None:
    without = "import runpy, sys; sys.modules['pybind11'] = None; runpy.run_path('setup.py')"
    environment = {**os.environ, "MEGATRON_CHATFLOW_CUDA": "01"[command == "build_py"]}
    build = subprocess.run(
        [sys.executable, "-c", without, command],
        cwd=CSRC.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode == 1 and "pip install 'pybind11" in build.stderr
