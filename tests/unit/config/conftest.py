"""Fixtures with a small complete configuration that tests modify."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from megatron_chatflow.config import RunConfig

_BASE: dict[str, Any] = {
    "model": {"preset": "tiny"},
    "tokenizer": {"tokenizer_model": "tokenizer.model"},
    "data": {
        "seq_length": 128,
        "sources": {
            "english": {"paths": ["data/en_text_document"]},
            "chat": {"paths": ["data/chat_messages_document"], "loss": "response"},
        },
        "schedule": {
            "knots": [
                {"at": 0, "weights": {"english": 0.9, "chat": 0.1}},
                {"at": "5K", "weights": {"english": 0.5, "chat": 0.5}, "ramp": "linear"},
            ]
        },
    },
    "optimizer": {"lr": 3e-4},
    "train": {"train_iters": 100, "micro_batch_size": 2, "global_batch_size": 8},
}

Change = Callable[..., dict[str, Any]]


def change(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of ``values`` with the values at dotted paths replaced."""
    changed = copy.deepcopy(values)
    for path, value in changes.items():
        *parents, last = path.split(".")
        place: Any = changed
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        place[last] = value
    return changed


@pytest.fixture
def values() -> Change:
    """Returns a function that builds a configuration mapping with some dotted paths replaced."""
    return lambda changes=None: change(_BASE, changes or {})


@pytest.fixture
def config(values: Change) -> Callable[..., RunConfig]:
    """Returns a function that builds a configuration with some dotted paths replaced."""
    return lambda changes=None: RunConfig.from_dict(values(changes))
