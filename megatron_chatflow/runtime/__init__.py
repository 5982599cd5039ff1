"""Processes, devices, parallel groups, seeds, signals, exit reporting and compiled modules.

`load_extension` loads the C++ modules that `setup.py` compiles from `csrc/blend`, `csrc/tokenizer`
and `csrc/data`. If a module was not built, the Python reference next to its caller does the same
work, many times slower.
"""

import functools
import importlib
import logging
from types import ModuleType


@functools.cache
def load_extension(package: str) -> ModuleType | None:
    """Imports the compiled module of the package ``blend``, ``tokenizer`` or ``data``.

    Returns ``megatron_chatflow.<package>._native``; None if it was not built, which is logged once.
    """
    try:
        return importlib.import_module(f"megatron_chatflow.{package}._native")
    except ImportError as error:
        logging.getLogger(__name__).warning(
            "csrc/%s is not built (%s); falling back to NumPy and Python, which is slower. "
            "Run make build to compile it",
            package,
            error,
        )
        return None
