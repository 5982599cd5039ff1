"""Builds megatron-core's optimizer, its learning-rate schedule and its gradient buffers.

Where neither Apex nor transformer-engine is installed, `FusedAdamW` gives megatron-core a fused
optimizer. Its arithmetic is PyTorch's own fused AdamW (Loshchilov and Hutter, 2019), which runs on
CPU and CUDA. Only the place of the step counter differs: it lies in the parameter group, as in
Apex, and not beside each tensor, because megatron-core's distributed optimizer can save and load
only that form.
"""

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from megatron.core import nccl_allocator
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.optim.adamw import adamw

from megatron_chatflow.checkpoint.state import LocalState
from megatron_chatflow.checkpoint.store import parameter_layout
from megatron_chatflow.config import OptimizerConfig, RunConfig, RunLength
from megatron_chatflow.errors import UserError
from megatron_chatflow.model.llama import Llama
from megatron_chatflow.model.objective import Objective
from megatron_chatflow.runtime.launch import device_mode
from megatron_chatflow.runtime.ranks import Ranks
from megatron_chatflow.training.guard import GuardedOptimizer
from megatron_chatflow.training.norms import NormMeter
from megatron_chatflow.training.stages import StagedOptimizer, StagePlan
from megatron_chatflow.training.weight_average import WeightAverage


class FusedAdamW(torch.optim.Optimizer):
    """PyTorch's fused AdamW with the step counter in the parameter group."""

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
        """Initializes the optimizer from Apex's arguments."""
        assert adam_w_mode, "this optimizer only supports decoupled weight decay"
        assert not capturable, "this optimizer does not support CUDA graph capture"
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
        # One tensor for all parameters, filled on its device, so that nothing is copied to a GPU.
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
    """Replaces Apex's multi_tensor_scale: scales a list of tensors into another."""
    for source, target in zip(*tensors, strict=True):
        torch.mul(source, factor, out=target)


def _l2_norm(
    _chunk_size: int, _overflow: Any, tensors: list[list[Any]], _per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """Replaces Apex's l2_norm: returns float32[1] without synchronizing the device."""
    norms = torch._foreach_norm(tensors[0])
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), None


def install_fused_adamw() -> str:
    """Makes megatron-core use `FusedAdamW` if neither Apex nor transformer-engine is installed.

    It replaces the names below, which megatron-core binds at import. Returns which optimizer the
    run uses and why, for the log.
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


def expandable_segments_variable() -> str | None:
    """Returns the environment variable that gives torch's allocator expandable segments."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if "expandable_segments:true" in os.environ.get(name, "").replace(" ", "").lower():
            return name
    return None


def _start_nccl_allocator() -> None:
    """Starts the allocator of NCCL's user buffers, which megatron-core compiles on first use."""
    if name := expandable_segments_variable():
        raise UserError(
            f"parallel.use_nccl_ub: does not work with expandable_segments:True in {name}; "
            "remove one of them"
        )
    try:
        nccl_allocator.init()
    except (OSError, RuntimeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            "parallel.use_nccl_ub: megatron-core cannot compile its allocator for NCCL's user "
            f"buffers: {reason}; it needs a compiler, NCCL's headers and a writable "
            f"{Path(nccl_allocator.__file__).parent / 'build'}, or turn them off"
        ) from error


@dataclass(frozen=True)
class Optimization:
    """The model with its optimizer and learning-rate schedule."""

    chunks: list[Any]  # model chunks with their gradient buffers
    optimizer: Any  # megatron-core's optimizer of the chunks
    scheduler: Any  # its learning-rate scheduler
    description: str  # which optimizer is used, and why
    update: GuardedOptimizer  # makes guarded optimizer steps
    # length of the run, which defines whether the schedule counts iterations or samples
    length: RunLength
    # whether updated parameters are gathered only in the next forward pass of training
    overlaps_param_gather: bool = False
    # the moving average of the weights; None without `ema_decay`
    average: WeightAverage | None = None
    # what each stage trains; None if everything is always trained in the same way
    stages: StagedOptimizer | None = None
    # measures norms of the weights and gradients; None unless they are logged
    norms: NormMeter | None = None

    def learning_rate(self) -> float:
        """Returns the learning rate of the next step."""
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    def weight_decay(self) -> float:
        """Returns the weight decay of the next step, of the parameters that have one."""
        return float(max(group["weight_decay"] for group in self.optimizer.param_groups))

    def begin_iteration(self, sample: int) -> None:
        """Starts the stage of training of the iteration that begins at a sample."""
        if self.stages is not None:
            self.stages.begin_iteration(sample, self.scheduler.num_steps)

    def mask_gradients(self) -> None:
        """Sets the reduced gradients of what the stage of training freezes to 0."""
        if self.stages is not None:
            self.stages.mask_gradients()

    def gather_parameters(self) -> None:
        """Gathers the parameters of the last update.

        Every rank calls it before a validation and before a save, because with
        `overlaps_param_gather` they are otherwise gathered only in the next training step.
        """
        if self.overlaps_param_gather:
            self._gather()

    def _gather(self) -> None:
        for chunk in self.chunks:
            if not chunk.ddp_config.use_distributed_optimizer:
                continue
            chunk.start_param_sync(force_sync=True)
            # megatron-core before 0.19 does this only when the next forward pass gathers.
            quantized = [p for p in chunk.parameters() if is_float8tensor(p)]
            if quantized:
                post_all_gather_processing(quantized)

    def average_states(self) -> list[LocalState]:
        """Returns the state of the moving average of the weights; empty without one."""
        return [] if self.average is None else self.average.states

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Returns the context in which the model has the average weights; every rank enters it."""
        assert self.average is not None, "the caller checks it"
        return self.average.applied(self._gather)

    def advance(self, num_samples: int) -> None:
        """Advances the learning rate by an iteration of ``num_samples`` samples."""
        self.scheduler.step(increment=num_samples if self.length.counts_samples else 1)

    def set_progress(self, iteration: int, consumed_samples: int) -> None:
        """Sets the learning rate to its value after the given iterations and samples."""
        self.scheduler.num_steps = 0
        self.scheduler.step(increment=self.length.lr_position(iteration, consumed_samples))


_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def optimizer_config(config: RunConfig, dtype: torch.dtype) -> MegatronOptimizerConfig:
    """Returns megatron-core's configuration of the optimizer of weights of a dtype.

    Raises:
        UserError: megatron-core refuses it.
    """
    settings, parallel = config.optimizer, config.parallel
    if settings.use_precision_aware_optimizer and find_spec("transformer_engine") is None:
        raise UserError(
            "optimizer.use_precision_aware_optimizer: needs the Adam of transformer-engine, which "
            "is not installed; install it, or remove the setting"
        )
    try:
        result = MegatronOptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            clip_grad=settings.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            overlap_param_gather=parallel.overlap_param_gather,
            use_precision_aware_optimizer=settings.use_precision_aware_optimizer,
            main_grads_dtype=_DTYPES[settings.main_grads_dtype],
            main_params_dtype=_DTYPES[settings.main_params_dtype],
            exp_avg_dtype=_DTYPES[settings.exp_avg_dtype],
            exp_avg_sq_dtype=_DTYPES[settings.exp_avg_sq_dtype],
            optimizer_cpu_offload=settings.optimizer_cpu_offload,
            optimizer_offload_fraction=settings.optimizer_offload_fraction,
            overlap_cpu_optimizer_d2h_h2d=settings.overlap_cpu_optimizer_d2h_h2d,
            pin_cpu_grads=torch.cuda.is_available(),
            # It decides who holds the master weights, which are transformer-engine's otherwise.
            fp8_recipe=config.train.fp8_recipe if config.train.fp8_param_gather else None,
            reuse_grad_buf_for_mxfp8_param_ag=config.train.reuse_grad_buf_for_mxfp8_param_ag,
        )
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"optimizer: megatron-core refuses it: {error}") from error
    has_adam = result.store_param_remainders or settings.optimizer_cpu_offload
    if settings.use_precision_aware_optimizer and not has_adam:
        raise UserError(
            "optimizer.use_precision_aware_optimizer: needs transformer-engine 2.1 or newer; "
            "install it, or remove the setting"
        )
    return result


def _describe_state(settings: OptimizerConfig) -> str:
    """Returns where and in which dtypes optimizer state is held, for the log."""
    if settings.optimizer_cpu_offload:
        share = f"{settings.optimizer_offload_fraction:.0%}"
        return f"; {share} of the state in host memory, where PyTorch's AdamW updates it"
    if settings.use_precision_aware_optimizer:
        moments = f"moments in {settings.exp_avg_dtype} and {settings.exp_avg_sq_dtype}"
        return f"; master weights in {settings.main_params_dtype}, {moments}"
    return ""


def _finalize_gradients(objective: Objective | None) -> Any:
    """Returns what reduces gradients and divides them by the tokens of the global batch.

    megatron-core counts loss tokens as integers. With weights of sources, the divisor is the sum
    of the weights of the loss tokens, which only the last pipeline stage knows, as it does theirs.
    """
    if objective is None:
        return finalize_model_grads

    def finalize(model: Any, num_tokens: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        finalize_model_grads(model, objective.take_total(), *args, **kwargs)

    return finalize


def build_scheduler(
    settings: OptimizerConfig, length: RunLength, optimizer: Any
) -> OptimizerParamScheduler:
    """Builds an optimizer's scheduler, which counts in the unit of `RunLength.lr_position`."""
    is_constant = settings.weight_decay_incr_style == "constant"
    return OptimizerParamScheduler(
        optimizer,
        init_lr=settings.lr_warmup_init,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=length.lr_warmup,
        # megatron-core requires one step of decay even if warmup takes the whole run.
        lr_decay_steps=max(length.lr_decay - length.lr_start, length.lr_warmup + 1),
        lr_decay_style=settings.lr_decay_style,
        wsd_decay_steps=length.lr_wsd_decay,
        lr_wsd_decay_style=settings.lr_wsd_decay_style,
        start_wd=settings.weight_decay if is_constant else settings.start_weight_decay,
        end_wd=settings.weight_decay if is_constant else settings.end_weight_decay,
        wd_incr_steps=0 if is_constant else length.end - length.lr_start,
        wd_incr_style=settings.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=False,
    )


def _skips_weight_gradients(config: RunConfig) -> bool:
    """Returns whether weights that are frozen need not require gradients.

    Overlapped reductions wait for the gradients of all parameters of a bucket. The others hold
    tensors of the layers that would be other ones.
    """
    parallel, train = config.parallel, config.train
    return not (
        parallel.overlap_grad_reduce
        or parallel.tp_comm_overlap
        or train.fine_grained_activation_offloading
        or train.cuda_graph_impl != "none"
    )


def build_optimization(
    config: RunConfig,
    llama: Llama,
    ranks: Ranks,
    length: RunLength | None = None,
    objective: Objective | None = None,
    stages: StagePlan | None = None,
) -> Optimization:
    """Wraps the model's chunks and builds their optimizer.

    Args:
        config: The configuration of the run.
        llama: The model.
        ranks: This process's place in the job.
        length: The length of a resumed run.
        objective: The weights of sources, if their tokens do not count alike.
        stages: The stages of training; everything is trained in the same way if None.
    """
    description = install_fused_adamw()
    length = length or RunLength.of(config)
    parallel = config.parallel
    if parallel.use_nccl_ub:
        _start_nccl_allocator()
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=not config.has_bf16_gradients,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        align_param_gather=parallel.overlap_param_gather and len(llama.chunks) > 1,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        pad_buckets_for_high_nccl_busbw=parallel.ddp_pad_buckets_for_high_nccl_busbw,
        nccl_ub=parallel.use_nccl_ub,
        disable_symmetric_registration=parallel.disable_symmetric_registration,
        fp8_param_gather=config.train.fp8_param_gather,
        reuse_grad_buf_for_mxfp8_param_ag=config.train.reuse_grad_buf_for_mxfp8_param_ag,
    )
    with device_mode(ranks.device):
        chunks = [
            # Later chunks reduce while other chunks compute, so buckets would gain nothing.
            DistributedDataParallel(llama.config, ddp_config, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(llama.chunks)
        ]
        optimizer = get_megatron_optimizer(
            optimizer_config(config, llama.dtype),
            chunks,
            use_gloo_process_groups=ranks.is_cuda,
        )
    if parallel.overlap_grad_reduce:
        # The backward pass of the last micro-batch reduces gradients once they are complete.
        no_sync = [chunk.no_sync for chunk in chunks]
        llama.config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
        if len(chunks) > 1:
            # All stages begin to reduce a chunk at the same point of the interleaved schedule.
            # Otherwise a stage that reduces earlier competes with the messages of the others.
            llama.config.grad_sync_func = [chunk.start_grad_sync for chunk in chunks]
            if parallel.overlap_param_gather:
                llama.config.param_sync_func = [chunk.start_param_sync for chunk in chunks]
    llama.config.finalize_model_grads_func = _finalize_gradients(objective)
    llama.config.grad_scale_func = optimizer.scale_loss
    decay = config.optimizer.ema_decay
    staged = None
    if stages is not None and not stages.is_trivial:
        staged = StagedOptimizer(
            stages,
            chunks,
            optimizer,
            parameter_layout(chunks).parts,
            length,
            skips_weight_gradients=_skips_weight_gradients(config),
        )
    norms, update = None, GuardedOptimizer(optimizer)
    if config.logging.log_params_norm or config.logging.log_layer_norms:
        parts = parameter_layout(chunks).parts
        norms = NormMeter(optimizer, parts, config, ranks)
        update.on_gradients = norms.observe_gradients
    return Optimization(
        chunks=chunks,
        optimizer=optimizer,
        scheduler=build_scheduler(config.optimizer, length, optimizer),
        description=description + _describe_state(config.optimizer),
        update=update,
        length=length,
        overlaps_param_gather=parallel.overlap_param_gather,
        average=None if decay is None else WeightAverage(optimizer, decay),
        stages=staged,
        norms=norms,
    )
