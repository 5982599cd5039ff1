"""Continued training of language models on a blend of sources that follows a schedule.

The blend is usable on its own::

    from megatron_chatflow import Blend, Schedule

    knots = [
        {"at": 0, "weights": {"english": 0.9, "chinese": 0.1}},
        {"at": 10_000, "weights": {"english": 0.2, "chinese": 0.8}, "ramp": "linear"},
    ]
    schedule = Schedule.from_dict({"knots": knots}, ["english", "chinese"], 512)
    source, index = Blend(schedule).take(0, 512)  # sample i is sample index[i] of source[i]

A run is configured by a YAML file and flags. Several processes are started by ``torchrun``::

    from megatron_chatflow import load_config, train

    train(load_config("run.yaml", ["--train-iters", "100"]))

These names are imported on first use, so that importing the package takes no time.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_chatflow.blend.blend import Blend
    from megatron_chatflow.blend.schedule import Schedule
    from megatron_chatflow.config.load import load_config
    from megatron_chatflow.pretrain import train

__version__ = "0.1.0"
__all__ = ["Blend", "Schedule", "__version__", "load_config", "train"]

_MODULES = {
    "Blend": "megatron_chatflow.blend.blend",
    "Schedule": "megatron_chatflow.blend.schedule",
    "load_config": "megatron_chatflow.config.load",
    "train": "megatron_chatflow.pretrain",
}


def __getattr__(name: str) -> Any:
    """Imports a public name from its module, see PEP 562."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """Lists the public names, imported or not."""
    return __all__
