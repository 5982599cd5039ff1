"""What the compiled kernels of `kernels.cpu` compute, in a few lines of PyTorch each.

Results are float32; gradients come from autograd. The kernels are held to them within one rounding
to bf16.
"""

import torch


def exponentiate(
    logits: torch.Tensor, num_valid_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``exp(logit - row's highest)``, each row's highest logit, and its sum; see the kernel."""
    pieces = logits[:, :num_valid_tokens].float()
    highest = pieces.amax(dim=-1) if num_valid_tokens else torch.full((len(logits),), -1e30)
    powers = torch.zeros(logits.shape)
    powers[:, :num_valid_tokens] = (pieces - highest.unsqueeze(-1)).exp()
    return powers, highest, powers.sum(dim=-1)


def rms_norm(rows: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019."""
    rows = rows.float()
    return rows * (rows.square().mean(dim=-1, keepdim=True) + epsilon).rsqrt() * weight.float()


def swiglu(rows: torch.Tensor) -> torch.Tensor:
    """Shazeer, "GLU Variants Improve Transformer", 2020: ``silu(gate) * linear``."""
    gate, linear = rows.float().chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * linear


def rotate(
    heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, direction: float = 1.0
) -> torch.Tensor:
    """Rotates ``[documents, length, heads, head_dim]`` by angles ``[tokens, head_dim / 2]``."""
    num_documents, length, _, head_dim = heads.shape
    shape = (num_documents, length, 1, head_dim // 2)
    cosines, sines = cosines.view(shape), sines.view(shape) * direction
    real, imaginary = heads.float().chunk(2, dim=-1)
    return torch.cat(
        (real * cosines - imaginary * sines, imaginary * cosines + real * sines), dim=-1
    )


def causal_softmax(scores: torch.Tensor, first_query: int, scale: float) -> torch.Tensor:
    """Softmax of ``[heads, queries, keys]``; query q sees keys 0 to ``first_query + q``."""
    _, num_queries, num_keys = scores.shape
    last = torch.arange(num_queries).unsqueeze(-1) + first_query
    hidden = torch.arange(num_keys) > last
    return (scores.float() * scale).masked_fill(hidden, float("-inf")).softmax(dim=-1)
