"""The forward step of one micro-batch, which megatron-core's pipeline schedules call.

It returns a model chunk's output and the function with which the last pipeline stage turns the
output into a summed loss, the number of loss tokens, and sums per source. Training and validation
use the same code.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed import ProcessGroup

from megatron_chatflow.data.loader import MicroBatch
from megatron_chatflow.model.llama import Llama
from megatron_chatflow.model.loss import (
    VocabularyShard,
    linear_cross_entropy,
    source_sums,
    vocabulary_shard,
)
from megatron_chatflow.model.objective import Objective
from megatron_chatflow.model.packed import ContextShard, pack_tokens, shard_context
from megatron_chatflow.runtime import ranks as megatron
from megatron_chatflow.runtime.device import to_device
from megatron_chatflow.runtime.ranks import Ranks

LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class ForwardStep:
    """Runs micro-batches through this process's part of the model.

    Attributes:
        llama: The model.
        device: The model's device.
        rows: This rank's shard of the vocabulary.
        num_bytes_per_id: int64[vocab_size] on ``device``: number of UTF-8 bytes of each id's text.
        num_sources: Number of rows of the per-source sums.
        context_rank: This process's context-parallel rank.
        context_size: The context-parallel size.
        context_group: The context-parallel group.
        objective: Weighs the loss tokens of sources; None if they count alike.
        on_micro_batch: Called at the beginning of each micro-batch.
    """

    llama: Llama
    device: torch.device
    rows: VocabularyShard
    num_bytes_per_id: torch.Tensor
    num_sources: int
    context_rank: int
    context_size: int
    context_group: ProcessGroup
    objective: Objective | None = None
    on_micro_batch: Callable[[], None] = _nothing

    @classmethod
    def build(
        cls,
        llama: Llama,
        ranks: Ranks,
        *,
        num_bytes_per_id: npt.NDArray[np.int64],
        num_sources: int,
        objective: Objective | None = None,
        on_micro_batch: Callable[[], None] = _nothing,
    ) -> "ForwardStep":
        """Builds the step for this process's place in the job."""
        rows = vocabulary_shard(
            rank=ranks.tensor_parallel_rank,
            size=ranks.tensor_parallel_size,
            padded_vocab_size=llama.padded_vocab_size,
            vocab_size=llama.vocab_size,
            group=megatron.tensor_parallel_group(),
        )
        return cls(
            llama=llama,
            device=ranks.device,
            rows=rows,
            num_bytes_per_id=torch.from_numpy(num_bytes_per_id).to(ranks.device),
            num_sources=num_sources,
            context_rank=ranks.context_parallel_rank,
            context_size=ranks.context_parallel_size,
            context_group=megatron.context_parallel_group(),
            objective=objective,
            on_micro_batch=on_micro_batch,
        )

    def __call__(
        self, micro_batches: Iterator[MicroBatch], model: Any
    ) -> tuple[torch.Tensor, LossFunction]:
        """Runs the next micro-batch.

        Returns:
            The chunk's output (hidden states, ``[1, tokens, hidden]`` on the last stage), and the
            loss function to call on it there.
        """
        self.on_micro_batch()
        batch = next(micro_batches)
        shard = shard_context(
            batch.tokens.numel(),
            rank=self.context_rank,
            size=self.context_size,
            group=self.context_group,
        )
        packed = pack_tokens(
            batch.cu_seqlens,
            shard,
            rotary=self.llama.rotary,
            dtype=self.llama.dtype,
            device=self.device,
            window=self.llama.window,
        )
        tokens = self._flat(batch.tokens, shard).unsqueeze(0)
        output = model(tokens, None, None, packed_seq_params=packed)

        def loss_function(
            hidden: torch.Tensor,
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return self._loss(hidden, batch, shard)

        return output, loss_function

    def _loss(
        self, hidden: torch.Tensor, batch: MicroBatch, shard: ContextShard
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        labels = self._flat(batch.labels, shard)
        loss_mask = self._flat(batch.loss_mask, shard)
        # One source per sample, or one per token.
        sources = batch.source.reshape(len(batch.source), -1).expand(batch.tokens.shape)
        source = self._flat(sources, shard)
        weighted = loss_mask if self.objective is None else self.objective.weigh(loss_mask, source)
        total, losses = linear_cross_entropy(
            hidden[0],
            self.llama.output_weight,
            labels,
            weighted,
            self.rows,
            sequence_parallel=self.llama.config.sequence_parallel,
            implementation=self.llama.loss,
        )
        sums = source_sums(
            losses.detach(),
            loss_mask,
            self.num_bytes_per_id[labels],
            source,
            self.num_sources,
        )
        return total, loss_mask.sum().int(), sums

    def _flat(self, rows: torch.Tensor, shard: ContextShard) -> torch.Tensor:
        """Returns the tokens that this rank holds, on its device."""
        return to_device(shard.select(rows.flatten()), self.device)
