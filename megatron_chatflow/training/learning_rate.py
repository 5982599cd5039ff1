"""Builds megatron-core's scheduler of learning rate and weight decay, in iterations or samples."""

from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_chatflow.config import OptimizerConfig, RunLength


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
