"""Builds the C++ extensions. All metadata of the package is in pyproject.toml.

Environment variables:
    MEGATRON_CHATFLOW_CUDA: 1 also builds the CUDA kernels, which needs nvcc.
    NVCC: The CUDA compiler (default: nvcc on PATH).
    NPY_NUM_BUILD_JOBS: Number of C++ files compiled in parallel (default: all cores).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

try:
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
except ImportError:  # metadata-only calls without the build requirements
    if "build_ext" in sys.argv or os.environ.get("MEGATRON_CHATFLOW_CUDA", "0") != "0":
        raise SystemExit(
            "error: building the extensions requires pybind11; pip install 'pybind11>=2.12'"
        ) from None
    setup()
else:
    ParallelCompile("NPY_NUM_BUILD_JOBS").install()

    class BuildExtensions(build_ext):
        """Builds the C++ extensions and, on request, the library of CUDA kernels."""

        def run(self) -> None:
            """Checks the request for CUDA kernels before compiling anything, then builds."""
            wanted = os.environ.get("MEGATRON_CHATFLOW_CUDA", "0")
            if wanted not in ("0", "1"):
                raise SystemExit(f"error: MEGATRON_CHATFLOW_CUDA is {wanted!r}; set it to 0 or 1")
            if wanted == "1" and shutil.which(os.environ.get("NVCC", "nvcc")) is None:
                raise SystemExit(
                    "error: MEGATRON_CHATFLOW_CUDA=1 requires nvcc, which is not on PATH; install "
                    "the CUDA toolkit, set NVCC to its compiler, or unset MEGATRON_CHATFLOW_CUDA"
                )
            try:
                super().run()
            finally:  # the CUDA kernels do not depend on the extensions
                if wanted == "1":
                    self.build_kernels()

        def build_kernels(self) -> None:
            """Compiles the library of CUDA kernels beside the extension."""
            folder = Path(self.get_ext_fullpath("megatron_chatflow.kernels._cpu")).parent
            build = ["csrc/kernels/build.sh", folder / "libchatflow_kernels.so"]
            if subprocess.run(build, check=False).returncode:
                raise SystemExit("error: csrc/kernels/build.sh failed, see above")

    def extension(name: str, folder: str, *options: str) -> Pybind11Extension:
        """Describes an extension module made from all sources of a folder."""
        return Pybind11Extension(
            f"megatron_chatflow.{name}",
            sorted(str(path) for path in Path(folder).glob("*.cpp")),
            include_dirs=[folder],
            cxx_std=17,
            extra_compile_args=["-O3", "-fvisibility=hidden", *options],
            # Apple's compiler has no OpenMP; kernels are single-threaded there.
            extra_link_args=[option for option in options if option == "-fopenmp"],
        )

    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    setup(
        ext_modules=[
            extension("blend._native", "csrc/blend"),
            extension("tokenizer._native", "csrc/tokenizer"),
            extension("data._native", "csrc/data"),
            extension(
                "kernels._cpu", "csrc/kernels/cpu", "-ffp-contract=fast", "-Wno-psabi", *openmp
            ),
        ],
        cmdclass={"build_ext": BuildExtensions},
    )
