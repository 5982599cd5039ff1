"""The learning-rate schedule: megatron-core's scheduler, in iterations or in samples.

It lies apart from the optimizer because a dry run and a resume use it without a model.
"""

from types import SimpleNamespace
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_chatflow.config import OptimizerConfig, RunLength


def build_scheduler(
    settings: OptimizerConfig, length: RunLength, optimizer: Any
) -> OptimizerParamScheduler:
    """Builds an optimizer's scheduler, which counts in the unit of `RunLength.lr_position`."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=settings.lr_warmup_init,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=length.lr_warmup,
        # megatron-core requires one step of decay even if warmup takes the whole run.
        lr_decay_steps=max(length.lr_decay, length.lr_warmup + 1),
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
    )


def learning_rate(
    settings: OptimizerConfig, length: RunLength, iteration: int, consumed_samples: int
) -> float:
    """Returns the learning rate of the iteration after ``iteration``."""
    scheduler = build_scheduler(settings, length, SimpleNamespace(param_groups=[]))
    scheduler.step(increment=length.lr_position(iteration, consumed_samples))
    return float(scheduler.get_lr({}))
