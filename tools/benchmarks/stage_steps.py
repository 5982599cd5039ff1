"""The steps of the benchmark of stages; see `stages`.

megatron-core is imported here, which must come after `initialize` on CPUs.
"""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.shapes import SUBJECT_SEED, Shape
from benchmarks.training_steps import mock_batch, run_config
from megatron_chatflow.blend.edits import run_positions
from megatron_chatflow.checkpoint.store import parameter_layout
from megatron_chatflow.model.forward import ForwardStep
from megatron_chatflow.model.llama import build_llama
from megatron_chatflow.runtime.launch import device_mode
from megatron_chatflow.runtime.ranks import Ranks
from megatron_chatflow.training.guard import Guard
from megatron_chatflow.training.loop import train_step
from megatron_chatflow.training.optimizer import Optimization, build_optimization
from megatron_chatflow.training.stages import StagedOptimizer, plan_stages

EVERYTHING, NEW_ROWS = "everything", "new rows"
ALL_GRADIENTS, OWN_BUFFERS = "new rows, all gradients", "new rows, own buffers"
_NUM_NEW = 3072


class Step:
    """A training step of one kind."""

    def __init__(self, shape: Shape, ranks: Ranks, mode: str) -> None:
        config = run_config(shape, ranks, bf16=ranks.is_cuda)
        with device_mode(ranks.device):
            llama = build_llama(
                config.model, config.parallel, config.train, ranks, vocab_size=shape.vocab_size
            )
        if mode == OWN_BUFFERS:
            for chunk in llama.chunks:
                for name, parameter in chunk.named_parameters():
                    parameter.requires_grad_("embedding" in name or "output_layer" in name)
        self._optimization = build_optimization(config, llama, ranks)
        if mode != EVERYTHING:
            self._optimization = _staged(self._optimization, config, shape, mode)
        self._optimization.set_progress(1, shape.micro_batch_size)
        self._forward_step = ForwardStep.build(
            llama, ranks, num_bytes_per_id=np.ones(shape.vocab_size, np.int64), num_sources=1
        )
        self._batch = mock_batch(shape.tokens(torch.Generator().manual_seed(SUBJECT_SEED)))
        self._ranks = ranks
        self._guard = Guard(config, ["mock"], {})

    def seconds(self) -> float:
        """Runs a step; returns its CPU time, or its time on a GPU."""
        is_cuda = self._ranks.is_cuda
        begin = time.perf_counter() if is_cuda else time.process_time()
        train_step(self._batch, self._optimization, self._forward_step, self._ranks, self._guard)
        if is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() if is_cuda else time.process_time()) - begin

    def buffer_bytes(self) -> int:
        """Returns the bytes of the gradient buffers."""
        return sum(
            buffer.grad_data.nbytes
            for chunk in self._optimization.chunks
            for buffer in chunk.buffers
        )

    def state_bytes(self) -> int:
        """Returns the bytes of the optimizer's state, besides master weights."""
        inner = self._optimization.optimizer.chained_optimizers[0].optimizer
        return sum(
            values.nbytes
            for state in inner.state.values()
            for values in state.values()
            if isinstance(values, torch.Tensor)
        )


def _staged(optimization: Optimization, config: Any, shape: Shape, mode: str) -> Optimization:
    stages = [{"at": 0, "trainable": [f"rows.{shape.vocab_size - _NUM_NEW}-"]}]
    values = config.to_dict()
    values["train"]["stages"] = stages
    staged = type(config).from_dict(values)
    plan = plan_stages(staged, run_positions(staged), shape.vocab_size, None)
    parts = parameter_layout(optimization.chunks).parts
    held = {p: found for p, found in parts.items() if hasattr(p, "main_grad")}
    return replace(
        optimization,
        stages=StagedOptimizer(
            plan,
            optimization.chunks,
            optimization.optimizer,
            held,
            optimization.length,
            skips_weight_gradients=mode != ALL_GRADIENTS,
        ),
    )
