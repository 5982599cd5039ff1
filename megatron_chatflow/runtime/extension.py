"""The C++ modules that `setup.py` compiles from `csrc/blend`, `csrc/tokenizer` and `csrc/data`.

Where they were not built, the Python references beside their callers do the same work, many times
slower.
"""

import functools
import importlib
import logging
from types import ModuleType


@functools.cache
def load_extension(package: str) -> ModuleType | None:
    """Imports the compiled module of a package.

    Args:
        package: ``blend``, ``tokenizer`` or ``data``.

    The log names what is missing, once.

    Returns:
        ``megatron_chatflow.<package>._native``, or None where it was not built.
    """
    try:
        return importlib.import_module(f"megatron_chatflow.{package}._native")
    except ImportError as error:
        logging.getLogger(__name__).warning(
            "csrc/%s is not built (%s): NumPy and Python do its work; make build compiles it",
            package,
            error,
        )
        return None
