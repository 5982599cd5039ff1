"""The optimizer, its learning-rate schedule and the gradient buffers, from megatron-core.

In: the model and its configuration. Out: `Optimization`, what a step and a checkpoint need.
"""

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

from megatron_chatflow.config import RunConfig, RunLength
from megatron_chatflow.model.llama import Llama
from megatron_chatflow.runtime.launch import device_mode
from megatron_chatflow.runtime.ranks import Ranks
from megatron_chatflow.train.adam import install_where_absent
from megatron_chatflow.train.guard import GuardedOptimizer
from megatron_chatflow.train.learning_rate import build_scheduler


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
        gathers_late: Whether an update reaches the other data-parallel ranks only in the next
            forward pass of training.
    """

    chunks: list[Any]
    optimizer: Any
    scheduler: Any
    description: str
    update: GuardedOptimizer
    length: RunLength
    gathers_late: bool = False

    def learning_rate(self) -> float:
        """The rate that the next step uses."""
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    def gather_parameters(self) -> None:
        """Makes the chunks' parameters those of the last update, for what is not training.

        Every rank calls it before a validation and before a save.
        """
        if self.gathers_late:
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
        gathers_late=parallel.overlap_param_gather,
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
