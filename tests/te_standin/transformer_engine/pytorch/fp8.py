"""Stand-in for the state of FP8: which recipe the products use at present."""

import atexit
import json
import os
from contextlib import contextmanager
from pathlib import Path

from transformer_engine.common.recipe import DelayedScaling

# The size of each product of a forward pass and the name of its recipe, for tests: this process
# writes them to a file that TE_STANDIN_PRODUCTS names, when it exits.
PRODUCTS = []


class FP8GlobalStateManager:
    recipe = None
    recipe_of_weights = None  # of layers that are built with weights in FP8

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.recipe is not None

    @classmethod
    def reset(cls) -> None:
        pass


@contextmanager
def fp8_autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None, _graph=False):
    outer = FP8GlobalStateManager.recipe
    FP8GlobalStateManager.recipe = (fp8_recipe or DelayedScaling()) if enabled else None
    try:
        yield
    finally:
        FP8GlobalStateManager.recipe = outer


@contextmanager
def fp8_model_init(enabled=True, recipe=None, preserve_high_precision_init_val=False):
    assert preserve_high_precision_init_val
    outer = FP8GlobalStateManager.recipe_of_weights
    FP8GlobalStateManager.recipe_of_weights = recipe if enabled else None
    try:
        yield
    finally:
        FP8GlobalStateManager.recipe_of_weights = outer


def record(x, weight) -> None:
    """Notes a product, after transformer-engine's check of its operands."""
    recipe = FP8GlobalStateManager.recipe
    for operand in () if recipe is None else (x.flatten(0, -2), weight):
        rows, columns = operand.shape
        if rows % (recipe.columns if recipe.columns == 32 else 8) or columns % recipe.columns:
            raise AssertionError(f"FP8 execution is impossible with an operand of {rows, columns}")
    if (log := os.environ.get("TE_STANDIN_PRODUCTS")) is not None:
        if not PRODUCTS:
            atexit.register(lambda: Path(f"{log}.{os.getpid()}").write_text(json.dumps(PRODUCTS)))
        PRODUCTS.append((*weight.shape, recipe and type(recipe).__name__))
