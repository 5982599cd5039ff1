"""Captures parts of the layers as CUDA graphs after the first steps of a run.

A CUDA graph launches the kernels of a part of a layer at once, which saves the host the time of
launching them one by one. transformer-engine captures one graph per layer and micro-batch of the
pipeline schedule (`make_graphed_callables`), which megatron-core replays while the model trains;
validation runs the layers without graphs. Attention is never captured: a graph fixes the shapes and
values of what it was captured with, and the documents of every micro-batch differ.
"""

import logging
import os
import time
from typing import Any

import torch
from megatron.core import num_microbatches_calculator as calculator
from megatron.core.transformer.cuda_graphs import TECudaGraphHelper

from megatron_chatflow.config import RunConfig
from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime.ranks import Ranks
from megatron_chatflow.training.callbacks import Callback
from megatron_chatflow.training.optimizer import Optimization, expandable_segments_variable

logger = logging.getLogger(__name__)


class CudaGraphs(Callback):
    """Captures the graphs before the step that follows ``--cuda-graph-warmup-steps`` steps."""

    def __init__(self, config: RunConfig, optimization: Optimization, ranks: Ranks) -> None:
        # megatron-core asserts this at the capture, after the first steps.
        variable = expandable_segments_variable()
        if variable is not None and os.environ.get("NCCL_GRAPH_REGISTER") != "0":
            raise UserError(
                f"train.cuda_graph_impl: with expandable_segments:True in {variable}, CUDA graphs "
                "need NCCL_GRAPH_REGISTER=0 in the environment; set it, or remove one of the two"
            )
        self._num_left = config.train.cuda_graph_warmup_steps
        self._chunks = optimization.chunks
        # A micro-batch is one row of packed tokens.
        self._num_tokens = config.train.micro_batch_size * config.data.seq_length
        self._optimizer = optimization.optimizer
        self._overlaps_param_gather = optimization.overlaps_param_gather
        self._helper: Any = None
        # megatron-core reads the number of micro-batches from a global variable.
        calculator.unset_num_microbatches_calculator()
        calculator.init_num_microbatches_calculator(
            rank=ranks.process.rank,
            rampup_batch_size=None,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            data_parallel_size=ranks.data_parallel_size,
        )

    def before_step(self, iteration: int) -> None:
        """Captures the graphs once the steps before them are done; every rank calls it."""
        if self._helper is not None:
            return
        if self._num_left:
            self._num_left -= 1
            return
        begin = time.perf_counter()
        self._helper = TECudaGraphHelper(
            self._chunks,
            self._chunks[0].config,
            seq_length=self._num_tokens,
            micro_batch_size=1,
            optimizers=[self._optimizer],
        )
        # The hooks that wait for parameters must not be captured. Graphs get hooks of their own.
        if self._overlaps_param_gather:
            for chunk in self._chunks:
                chunk.disable_forward_pre_hook(param_sync=False)
        self._helper.create_cudagraphs()
        if self._overlaps_param_gather:
            for chunk in self._chunks:
                chunk.enable_forward_pre_hook()
            self._helper.cuda_graph_set_manual_hooks()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        logger.info("captured the CUDA graphs before iteration %d in %.1f s", iteration, seconds)

    def close(self) -> None:
        """Deletes the graphs, which use the process groups, before the groups are destroyed."""
        if self._helper is not None and self._helper.graphs_created():
            self._helper.delete_cuda_graphs()
        calculator.unset_num_microbatches_calculator()
