"""The optimizer, its learning-rate schedule and the gradient buffers, from megatron-core.

In: the model and its configuration. Out: `Optimization`, what a step and a checkpoint need.

AdamW in the form that megatron-core expects of a fused optimizer, where Apex and TE are absent.

In: parameter groups in fp32. Out: updated parameters. The arithmetic is torch's own fused AdamW
(Loshchilov and Hutter, 2019), which runs on CPU and CUDA. What differs is where the step is kept:
in the parameter group, as in Apex, and not beside each tensor, because megatron-core's distributed
optimizer can save and load only that form.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from torch.optim.adamw import adamw

from megatron_chatflow.config import RunConfig, RunLength
from megatron_chatflow.model.llama import Llama
from megatron_chatflow.runtime.launch import device_mode
from megatron_chatflow.runtime.ranks import Ranks
from megatron_chatflow.train.guard import GuardedOptimizer
from megatron_chatflow.train.learning_rate import build_scheduler


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


@dataclass(frozen=True)
class Optimization:
    """The model under training.

    Attributes:
        chunks: Model chunks with their gradient buffers.
        optimizer: megatron-core's optimizer over them.
        scheduler: Its learning rate.
        description: Which optimizer this is, and why.
        update: Takes the optimizer's steps.
        length: The run's, which says whether the learning rate counts iterations or samples.
        overlaps_param_gather: Whether updated parameters are gathered only in the next forward
            pass of training.
    """

    chunks: list[Any]
    optimizer: Any
    scheduler: Any
    description: str
    update: GuardedOptimizer
    length: RunLength
    overlaps_param_gather: bool = False

    def learning_rate(self) -> float:
        """The rate that the next step uses."""
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    def gather_parameters(self) -> None:
        """Makes the chunks' parameters those of the last update, for what is not training.

        Every rank calls it before a validation and before a save.
        """
        if self.overlaps_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def advance(self, num_samples: int) -> None:
        """Moves the learning rate on by an iteration of ``num_samples`` samples."""
        self.scheduler.step(increment=self.length.lr_position(1, num_samples))

    def set_progress(self, iteration: int, consumed_samples: int) -> None:
        """Sets the learning rate to its value after so many iterations and samples."""
        self.scheduler.num_steps = 0
        self.scheduler.step(increment=self.length.lr_position(iteration, consumed_samples))


def build_optimization(
    config: RunConfig, llama: Llama, ranks: Ranks, length: RunLength | None = None
) -> Optimization:
    """Wraps the model's chunks and builds their optimizer.

    Args:
        config: The run's.
        llama: Its model.
        ranks: This process's place.
        length: Of a run that is resumed; that of a run from the beginning when left out.
    """
    description = install_where_absent()
    length = length or RunLength.of(config)
    parallel = config.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    with device_mode(ranks.device):
        chunks = [
            # Later chunks reduce while other chunks compute: cutting them up gains nothing.
            DistributedDataParallel(llama.config, ddp_config, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(llama.chunks)
        ]
        optimizer = get_megatron_optimizer(
            _optimizer_config(config, llama), chunks, use_gloo_process_groups=ranks.is_cuda
        )
    if parallel.overlap_grad_reduce:
        # Gradients are reduced once they are whole, in the backward pass of the last micro-batch.
        no_sync = [chunk.no_sync for chunk in chunks]
        llama.config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    llama.config.finalize_model_grads_func = finalize_model_grads
    llama.config.grad_scale_func = optimizer.scale_loss
    return Optimization(
        chunks=chunks,
        optimizer=optimizer,
        scheduler=build_scheduler(config.optimizer, length, optimizer),
        description=description,
        update=GuardedOptimizer(optimizer),
        length=length,
        overlaps_param_gather=parallel.overlap_param_gather,
    )


def _optimizer_config(config: RunConfig, llama: Llama) -> MegatronOptimizerConfig:
    settings = config.optimizer
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=llama.dtype == torch.bfloat16,
        params_dtype=llama.dtype,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
