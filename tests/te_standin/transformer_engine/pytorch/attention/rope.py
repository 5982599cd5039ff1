"""Stand-in for the fused rotation."""

import torch


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
    real, imaginary = t.float().chunk(2, -1)
    turned = torch.cat((-imaginary, real), -1)
    return (t.float() * freqs.cos() + turned * freqs.sin()).to(t.dtype)
