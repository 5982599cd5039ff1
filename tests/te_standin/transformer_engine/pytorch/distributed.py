"""Stand-ins for random states and recomputation, which a model without dropout does not need."""

from contextlib import contextmanager

from torch.utils.checkpoint import checkpoint as recompute

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, fp8_autocast


class CudaRNGStatesTracker: ...


@contextmanager
def activation_recompute_forward(activation_recompute=False, recompute_phase=False):
    yield


def get_all_rng_states():
    return {}


def is_fp8_activation_recompute_enabled():
    return False


def checkpoint(function, *args, **kwargs):
    use_reentrant = kwargs.pop("use_reentrant", True)
    for unused in ("distribute_saved_activations", "get_rng_state_tracker", "tp_group"):
        kwargs.pop(unused, None)
    recipe = FP8GlobalStateManager.recipe

    def run(*inputs):
        # The backward pass recomputes with the recipe of the forward pass.
        with fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe):
            return function(*inputs, **kwargs)

    return recompute(run, *args, use_reentrant=use_reentrant)
