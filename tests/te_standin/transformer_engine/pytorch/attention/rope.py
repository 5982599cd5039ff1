"""Stand-in for the fused rotation."""

import torch


@torch.library.custom_op("te_standin::rotate", mutates_args=())
def _rotate(t: torch.Tensor, freqs: torch.Tensor, direction: float) -> torch.Tensor:
    real, imaginary = t.float().chunk(2, -1)
    turned = torch.cat((-imaginary, real), -1) * direction
    return (t.float() * freqs.cos() + turned * freqs.sin()).to(t.dtype)


@_rotate.register_fake
def _(t, freqs, direction):
    return t.new_empty(t.shape)


def _keep(ctx, inputs, output):
    _, freqs, ctx.direction = inputs
    ctx.save_for_backward(freqs)


def _gradient(ctx, gradient):
    return _rotate(gradient, *ctx.saved_tensors, -ctx.direction), None, None


_rotate.register_autograd(_gradient, setup_context=_keep)


def apply_rotary_pos_emb(
    t,
    freqs,
    tensor_format="sbhd",
    start_positions=None,
    interleaved=False,
    fused=False,
    cu_seqlens=None,
    cp_size=1,
    cp_rank=0,
):
    assert tensor_format == "sbhd" and fused and not interleaved and freqs.dtype == torch.float32
    assert freqs.shape == (t.shape[0], 1, 1, t.shape[-1])
    return _rotate(t, freqs, 1.0)
