"""Fixtures that build the tiny run's configuration with changes."""

from collections.abc import Callable
from typing import Any

import pytest
import yaml
from tiny_run import TinyRun

from megatron_chatflow.config import RunConfig

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def make_config(tiny_run: TinyRun) -> MakeConfig:
    """Builds the tiny run's configuration; ``data__seq_length=8`` sets ``data.seq_length``."""

    def make(**changes: Any) -> RunConfig:
        values = yaml.safe_load(tiny_run.config.read_text(encoding="utf-8"))
        for path, value in changes.items():
            *parents, last = path.split("__")
            section = values
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = value
        return RunConfig.from_dict(values)

    return make
