"""The fixture with which tests simulate ranks."""

from collections.abc import Iterator

import pytest
from simulator import ROOT, Simulator


@pytest.fixture(scope="session")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    simulator = Simulator(tmp_path_factory.mktemp("simulator"))
    yield simulator
    simulator.close()


@pytest.fixture(scope="session")
def with_stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    """Returns a simulator whose runs find the stand-in for transformer-engine."""
    folder = tmp_path_factory.mktemp("transformer_engine")
    simulator = Simulator(folder, ROOT / "tests" / "te_standin")
    yield simulator
    simulator.close()
