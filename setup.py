"""Builds the extensions; everything else about the package stands in pyproject.toml.

``MEGATRON_CHATFLOW_CUDA=1`` builds the CUDA kernels besides; where there is no nvcc, an error.
``NPY_NUM_BUILD_JOBS`` is how many C++ files are compiled at a time, all cores if unset.
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
            "error: nothing can be built without pybind11; pip install 'pybind11>=2.12'"
        ) from None
    setup()
else:
    ParallelCompile("NPY_NUM_BUILD_JOBS").install()

    class BuildExtensions(build_ext):
        """The C++ extension, and the library of CUDA kernels where it is asked for."""

        def run(self) -> None:
            """Builds; what was asked for and cannot be built is known before anything is."""
            wanted = os.environ.get("MEGATRON_CHATFLOW_CUDA", "0")
            if wanted not in ("0", "1"):
                raise SystemExit(f"error: MEGATRON_CHATFLOW_CUDA: {wanted!r} is neither 0 nor 1")
            if wanted == "1" and shutil.which(os.environ.get("NVCC", "nvcc")) is None:
                raise SystemExit(
                    "error: MEGATRON_CHATFLOW_CUDA=1 asks for the CUDA kernels and there is no "
                    "nvcc on PATH; install the CUDA toolkit, name its nvcc in NVCC, or unset the "
                    "variable"
                )
            try:
                super().run()
            finally:  # what the C++ compiler refuses is no reason to go without the kernels
                if wanted == "1":
                    self.build_kernels()

        def build_kernels(self) -> None:
            """The library lies beside the extension."""
            folder = Path(self.get_ext_fullpath("megatron_chatflow.kernels._cpu")).parent
            build = ["csrc/kernels/build.sh", folder / "libchatflow_kernels.so"]
            if subprocess.run(build, check=False).returncode:
                raise SystemExit("error: csrc/kernels/build.sh failed, see above")

    def extension(name: str, folder: str, *options: str) -> Pybind11Extension:
        """The module that the sources of one folder make up."""
        return Pybind11Extension(
            f"megatron_chatflow.{name}",
            sorted(str(path) for path in Path(folder).glob("*.cpp")),
            include_dirs=[folder],
            cxx_std=17,
            extra_compile_args=["-O3", "-fvisibility=hidden", *options],
            # Apple's compiler brings no OpenMP: there the kernels run on one thread.
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
