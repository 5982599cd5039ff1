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
from megatron_chatflow.model.layer_spec import without_offloading
from megatron_chatflow.runtime import ranks as megatron
from megatron_chatflow.runtime.launch import device_mode
from megatron_chatflow.runtime.ranks import Ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceLoss:
    """Validation loss of a source."""

    loss: float  # mean loss per token, in nats
    bits_per_byte: float  # loss in bits over the UTF-8 bytes of the tokens' text; NaN without bytes
    num_tokens: int  # number of loss tokens


@dataclass(frozen=True)
class Validator:
    """Evaluates the model on the held-out samples of every source."""

    # held-out sources in the training sources' order; empty ones are skipped
    sources: Sequence[Source]
    max_samples: int  # maximum number of samples per source; the first ones are used
    micro_batch_size: int  # samples per micro-batch
    # sources that were reported to have no loss tokens
    reported: set[str] = field(default_factory=set)

    def run(
        self, forward_step: ForwardStep, chunks: list[Any], ranks: Ranks
    ) -> dict[str, SourceLoss]:
        """Evaluates every source; every rank calls it and receives the same result."""
        sums = torch.zeros(len(self.sources), 3, dtype=torch.float64, device=ranks.device)
        for number, source in enumerate(self.sources):
            batches = self._micro_batches(number, source, ranks)
            sums += sum_losses(batches, forward_step, chunks, ranks)
        losses = {}
        for source, row in zip(self.sources, reduce_source_sums(sums, ranks).tolist(), strict=True):
            loss_sum, num_tokens, num_bytes = row
            if num_tokens:
                bits_per_byte = loss_sum / math.log(2) / num_bytes if num_bytes else math.nan
                loss = SourceLoss(loss_sum / num_tokens, bits_per_byte, int(num_tokens))
                losses[source.name] = loss
            elif source.num_samples and source.name not in self.reported:
                self.reported.add(source.name)
                logger.warning(
                    "validation: the first %d held-out samples of %s have no loss tokens, so "
                    "this source is not validated; raise train.eval_iters or hold out other "
                    "documents",
                    min(self.max_samples, source.num_samples),
                    source.name,
                )
        return losses

    def _micro_batches(self, number: int, source: Source, ranks: Ranks) -> list[MicroBatch]:
        """Returns this rank's micro-batches, the last one filled with samples without loss."""
        num_samples = min(self.max_samples, source.num_samples)
        mine = range(ranks.data_parallel_rank, num_samples, ranks.data_parallel_size)
        batches = []
        for begin in range(0, len(mine), self.micro_batch_size):
            indices = list(mine[begin : begin + self.micro_batch_size])
            num_filled = self.micro_batch_size - len(indices)
            indices += indices[-1:] * num_filled
            samples = [source.sample_in_order(i) for i in indices]
            batch = collate(samples, [number] * self.micro_batch_size, indices)
            if num_filled:
                batch.loss_mask[-num_filled:] = 0
            batches.append(batch)
        return batches


def sum_losses(
    batches: Sequence[MicroBatch], forward_step: ForwardStep, chunks: list[Any], ranks: Ranks
) -> torch.Tensor:
    """Evaluates micro-batches of one row of packed tokens, without gradients.

    Returns the sums of the forward step, float64[num_sources, 3]. They are zero without batches and
    except on the last pipeline stage.
    """
    sums = torch.zeros(forward_step.num_sources, 3, dtype=torch.float64, device=ranks.device)
    if not batches:
        return sums
    # The interleaved schedule needs whole groups, which micro-batches without loss complete.
    group = ranks.pipeline_parallel_size if len(chunks) > 1 else 1
    filler = replace(batches[-1], loss_mask=torch.zeros_like(batches[-1].loss_mask))
    batches = [*batches, *[filler] * (-len(batches) % group)]
    for chunk in chunks:
        chunk.eval()
    pause = without_offloading(forward_step.llama.config)
    with torch.no_grad(), device_mode(ranks.device), pause:
        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in chunks],
            model=chunks,
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.numel(),
            micro_batch_size=1,
            forward_only=True,
        )
    for chunk in chunks:
        chunk.train()
    return torch.stack(results).sum(dim=0) if ranks.is_last_stage else sums


def reduce_source_sums(sums: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Sums per-source sums over the data-parallel ranks and distributes them to every stage.

    ``sums`` is float64[num_sources, 3], zero except on the last pipeline stage; it is changed in
    place.
    """
    torch.distributed.all_reduce(
        sums, group=megatron.data_parallel_group(with_context_parallel=True)
    )
    if ranks.pipeline_parallel_size > 1:
        torch.distributed.all_reduce(sums, group=megatron.pipeline_parallel_group())
    return sums
