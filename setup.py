"""Builds the extensions; everything else about the package stands in pyproject.toml."""

from pathlib import Path

from setuptools import setup

try:
    from pybind11.setup_helpers import Pybind11Extension, build_ext
except ImportError:  # metadata-only calls without the build requirements
    setup()
else:
    sources = sorted(str(path) for path in Path("csrc/data").glob("*.cpp"))
    extensions = [
        Pybind11Extension(
            "megatron_chatflow.native._data",
            sources,
            include_dirs=["csrc/data"],
            cxx_std=17,
            extra_compile_args=["-O3", "-fvisibility=hidden"],
        )
    ]
    setup(ext_modules=extensions if sources else [], cmdclass={"build_ext": build_ext})
