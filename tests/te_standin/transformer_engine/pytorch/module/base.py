"""Stand-in for the base class of layers, and for user buffers."""

from enum import Enum

import torch

from transformer_engine.common.recipe import (
    Float8BlockScaling,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
)


class TransformerEngineBaseModule(torch.nn.Module):
    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        assert state is None, "a checkpoint's extra state must not be loaded"


_dummy_wgrads = {}


def get_dummy_wgrad(shape, dtype, zero=False):
    """Returns a gradient for autograd whose values nobody may read; each size has one tensor."""
    key = tuple(shape), dtype
    if key not in _dummy_wgrads:
        device = torch.cuda.current_device()
        _dummy_wgrads[key] = torch.full(shape, torch.nan, dtype=dtype, device=device)
    if zero:
        _dummy_wgrads[key].zero_()
    return _dummy_wgrads[key].detach()


class UserBufferQuantizationMode(Enum):
    NONE = "none"
    FP8 = "fp8"


# Shape, modes and number of ranks of the buffers, which only the stand-in's checks use.
user_buffers = None


def initialize_ub(
    shape,
    tp_size,
    use_fp8=False,
    quantization_modes=None,
    dtype=torch.bfloat16,
    ub_cfgs=None,
    bootstrap_backend=None,
):
    global user_buffers
    assert user_buffers is None, "UB communicators are already initialized."
    assert tp_size > 1 and bootstrap_backend == "nccl"
    assert dtype == torch.bfloat16, "the reduction kernels of user buffers add values of 2 bytes"
    user_buffers = (tuple(shape), quantization_modes, tp_size)


def destroy_ub():
    global user_buffers
    user_buffers = None


def check_user_buffer(rows, recipe=None):
    """Fails unless there is a buffer for the rows of a product in this precision."""
    blocks = () if recipe is None else (Float8BlockScaling, NVFP4BlockScaling)
    assert not isinstance(recipe, blocks), "Unsupported quantizer for Userbuffers"
    is_fp8 = recipe is not None
    assert user_buffers is not None, "the layer overlaps, and initialize_ub has not been called"
    shape, modes, size = user_buffers
    kind = UserBufferQuantizationMode.FP8 if is_fp8 else UserBufferQuantizationMode.NONE
    assert kind in modes, f"no user buffer for {kind}"
    assert rows.flatten(0, -2).shape[0] == shape[0], f"{rows.shape} in a user buffer of {shape}"
    if isinstance(recipe, MXFP8BlockScaling):
        assert shape[0] // size % 128 == 0, "scales of MXFP8 are padded to 128 rows"
