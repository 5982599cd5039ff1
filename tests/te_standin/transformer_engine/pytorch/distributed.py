"""Stand-ins for random states and recomputation, which a model without dropout does not need."""

from contextlib import contextmanager


class CudaRNGStatesTracker: ...


@contextmanager
def activation_recompute_forward(activation_recompute=False, recompute_phase=False):
    yield


def get_all_rng_states():
    return {}


def checkpoint(
    function,
    *args,
    distribute_saved_activations=False,
    get_rng_state_tracker=None,
    tp_group=None,
    use_reentrant=True,
    **kwargs,
):
    raise NotImplementedError("megatron-core calls it only with FP8")
