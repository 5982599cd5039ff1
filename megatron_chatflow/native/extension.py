"""The module that `setup.py` compiles from `csrc/data`, or None where it was not built.

In: nothing. Out: `extension`. Without it the references do the same work, many times slower.
"""

import importlib
import logging
from types import ModuleType


def _load() -> ModuleType | None:
    try:
        return importlib.import_module("megatron_chatflow.native._data")
    except ImportError as error:
        logging.getLogger(__name__).warning(
            "csrc/data is not built (%s): the data path runs in NumPy; make build compiles it",
            error,
        )
        return None


extension = _load()
