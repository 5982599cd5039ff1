"""Tests that garbage collection runs at multiples of the interval and only there."""

import gc
import weakref

from megatron_chatflow.training.callbacks.process import GarbageCollection


class _Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_it_collects_at_multiples_and_leaves_things_as_they_were() -> None:
    collection = GarbageCollection(3)
    try:
        assert not gc.isenabled()
        alive = weakref.ref(_Cycle())
        for iteration in (1, 2):
            collection.after_iteration(iteration)
            assert alive() is not None
        collection.after_iteration(3)
        assert alive() is None
    finally:
        collection.close()
    assert gc.isenabled()


def test_without_an_interval_python_collects() -> None:
    collection = GarbageCollection(None)
    assert gc.isenabled()
    collection.after_iteration(1)
    collection.close()
    assert gc.isenabled()
