"""AdamW in the form that megatron-core expects of a fused optimizer, where Apex and TE are absent.

In: parameter groups in fp32. Out: updated parameters. The arithmetic is torch's own fused AdamW
(Loshchilov and Hutter, 2019), which runs on CPU and CUDA. What differs is where the step is kept:
in the parameter group, as in Apex, and not beside each tensor, because megatron-core's distributed
optimizer can save and load only that form.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw


class FusedAdamW(torch.optim.Optimizer):
    """torch's fused AdamW with the step in the parameter group."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        """Takes Apex's arguments.

        Args:
            params: Parameters or parameter groups.
            lr: Learning rate.
            betas: Decay of the two moments.
            eps: Added to the square root of the second moment.
            weight_decay: Decoupled weight decay.
            adam_w_mode: Has to be True.
            capturable: Has to be False: the step lies on the host, out of a CUDA graph's reach.
        """
        assert adam_w_mode, "weight decay is decoupled in this optimizer"
        assert not capturable, "the optimizer's step cannot be captured in a CUDA graph"
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            self._step_group(group)

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        # One tensor for all of them: filled where it lies, nothing is copied to a GPU.
        step = float(group["step"])
        steps = torch.full((len(params),), step, dtype=torch.float32, device=params[0].device)
        adamw(
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            list(steps.unbind()),
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        group["step"] += 1


def _scale(_chunk_size: int, _overflow: Any, tensors: list[list[Any]], factor: float) -> None:
    """Scales a list of tensors into another, like Apex's kernel; in place without a copy."""
    for source, target in zip(*tensors, strict=True):
        torch.mul(source, factor, out=target)


def _l2_norm(
    _chunk_size: int, _overflow: Any, tensors: list[list[Any]], _per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """Norm of all tensors together, float32[1], like Apex's kernel: no tensor's is waited for."""
    norms = torch._foreach_norm(tensors[0])
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), None


def install_where_absent() -> str:
    """Gives megatron-core this optimizer unless Apex or transformer-engine brought theirs.

    Returns:
        Which optimizer the run uses and why, for the log.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import clip_grads, distrib_optimizer

    if not optimizer.USING_PYTORCH_OPTIMIZER and optimizer.Adam is not FusedAdamW:
        return f"{optimizer.Adam.__module__}.{optimizer.Adam.__name__}"
    optimizer.Adam = FusedAdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = FusedAdamW
    distrib_optimizer.USING_APEX_OPTIMIZER = True
    distrib_optimizer.HAVE_APEX_OR_TE = True
    clip_grads.multi_tensor_scale_impl = _scale
    clip_grads.l2_norm_impl = _l2_norm
    return "torch's fused AdamW: neither transformer-engine nor Apex is installed"
