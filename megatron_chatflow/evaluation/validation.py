"""Computes each source's validation loss, in nats per loss token and in bits per UTF-8 byte.

Bits per byte are comparable across vocabularies. A source whose held-out samples have no loss
tokens is absent from the result and reported once, as is a source without held-out samples.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_chatflow.data.loader import MicroBatch, collate
from megatron_chatflow.data.source import Source
from megatron_chatflow.model.forward import ForwardStep
from megatron_chatflow.runtime import ranks as megatron
from megatron_chatflow.runtime.launch import device_mode
from megatron_chatflow.runtime.ranks import Ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceLoss:
    """Validation loss of a source.

    Attributes:
        loss: Mean loss per token, in nats.
        bits_per_byte: Loss in bits over the UTF-8 bytes of the tokens' text; NaN without bytes.
        num_tokens: Number of loss tokens.
    """

    loss: float
    bits_per_byte: float
    num_tokens: int


@dataclass(frozen=True)
class Validator:
    """Evaluates the model on the held-out samples of every source.

    Attributes:
        sources: Held-out sources in the training sources' order; empty ones are skipped.
        max_samples: Maximum number of samples per source; the first ones are used.
        micro_batch_size: Samples per micro-batch.
        seq_length: Tokens per sample.
        reported: Sources that were reported to have no loss tokens.
    """

    sources: Sequence[Source]
    max_samples: int
    micro_batch_size: int
    seq_length: int
    reported: set[str] = field(default_factory=set)

    def run(
        self, forward_step: ForwardStep, chunks: list[Any], ranks: Ranks
    ) -> dict[str, SourceLoss]:
        """Evaluates every source; every rank calls it and receives the same result."""
        sums = torch.zeros(len(self.sources), 3, dtype=torch.float64, device=ranks.device)
        for chunk in chunks:
            chunk.eval()
        for number, source in enumerate(self.sources):
            batches = self._micro_batches(number, source, ranks)
            if batches:
                sums += self._forward(batches, forward_step, chunks, ranks)
        for chunk in chunks:
            chunk.train()
        rows = dict(
            zip(
                (source.name for source in self.sources),
                reduce_source_sums(sums, ranks).tolist(),
                strict=True,
            )
        )
        for source in self.sources:
            if source.num_samples and not rows[source.name][1] and source.name not in self.reported:
                self.reported.add(source.name)
                logger.warning(
                    "validation: the first %d held-out samples of %s have no loss tokens, so "
                    "this source is not validated; raise train.eval_iters or hold out other "
                    "documents",
                    min(self.max_samples, source.num_samples),
                    source.name,
                )
        return {name: _source_loss(row) for name, row in rows.items() if row[1] > 0}

    def _micro_batches(self, number: int, source: Source, ranks: Ranks) -> list[MicroBatch]:
        """Returns this rank's micro-batches, the last one filled with samples without loss."""
        num_samples = min(self.max_samples, source.num_samples)
        mine = range(ranks.data_parallel_rank, num_samples, ranks.data_parallel_size)
        batches = []
        for begin in range(0, len(mine), self.micro_batch_size):
            indices = list(mine[begin : begin + self.micro_batch_size])
            num_filled = self.micro_batch_size - len(indices)
            samples = [source.sample_in_order(i) for i in indices + indices[-1:] * num_filled]
            batch = collate(
                samples,
                source=[number] * self.micro_batch_size,
                sample_index=indices + indices[-1:] * num_filled,
            )
            if num_filled:
                batch.loss_mask[-num_filled:] = 0
            batches.append(batch)
        return batches

    def _forward(
        self,
        batches: list[MicroBatch],
        forward_step: ForwardStep,
        chunks: list[Any],
        ranks: Ranks,
    ) -> torch.Tensor:
        batches = pad_to_pipeline_groups(batches, len(chunks), ranks)
        with torch.no_grad(), device_mode(ranks.device):
            results = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(batches) for _ in chunks],
                model=chunks,
                num_microbatches=len(batches),
                # A micro-batch is one row of packed tokens.
                seq_length=self.micro_batch_size * self.seq_length,
                micro_batch_size=1,
                forward_only=True,
            )
        if not ranks.is_last_stage:
            return torch.zeros(len(self.sources), 3, dtype=torch.float64, device=ranks.device)
        return torch.stack(results).sum(dim=0)


def pad_to_pipeline_groups(
    batches: list[MicroBatch], num_chunks: int, ranks: Ranks
) -> list[MicroBatch]:
    """Appends micro-batches without loss, as the interleaved schedule needs whole groups.

    Args:
        batches: Micro-batches, at least one.
        num_chunks: Model chunks per rank; more than one selects the interleaved schedule.
        ranks: This process's place in every parallel group.
    """
    group = ranks.pipeline_parallel_size if num_chunks > 1 else 1
    filler = replace(batches[-1], loss_mask=torch.zeros_like(batches[-1].loss_mask))
    return batches + [filler] * (-len(batches) % group)


def reduce_source_sums(sums: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Sums per-source sums over the data-parallel ranks and distributes them to every stage.

    Args:
        sums: float64[num_sources, 3], zero except on the last pipeline stage; changed in place.
        ranks: This process's place in every parallel group.
    """
    torch.distributed.all_reduce(
        sums, group=megatron.data_parallel_group(with_context_parallel=True)
    )
    if ranks.pipeline_parallel_size > 1:
        torch.distributed.all_reduce(sums, group=megatron.pipeline_parallel_group())
    return sums


def _source_loss(row: list[float]) -> SourceLoss:
    loss_sum, num_tokens, num_bytes = row
    return SourceLoss(
        loss=loss_sum / num_tokens,
        bits_per_byte=loss_sum / math.log(2) / num_bytes if num_bytes else math.nan,
        num_tokens=int(num_tokens),
    )
