"""Computes log-probabilities of spans of token sequences, of exported models and in training.

`score_rows` uses an exported model. `PackedRows` computes the same for a model in training, at any
parallel layout: every row is a document in a packed micro-batch, and every span is a source of its
own in the sums of the forward pass, so that the negative sum of a span's losses is its
log-probability. It draws no random numbers and changes no weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_chatflow.data.loader import MicroBatch
from megatron_chatflow.evaluation.models import LanguageModel
from megatron_chatflow.evaluation.validation import reduce_source_sums, sum_losses
from megatron_chatflow.model.forward import ForwardStep
from megatron_chatflow.runtime.ranks import Ranks

FloatArray = npt.NDArray[np.float64]
_ROWS_AT_A_TIME = 64


@dataclass(frozen=True)
class ScoredRow:
    """A token sequence and the spans of it whose log-probability is computed."""

    # token ids; the last one is only a label, so a model of `max_length` tokens reads one more
    ids: Sequence[int]
    # half-open ranges of positions in `ids`, which do not overlap and do not contain position 0
    spans: Sequence[tuple[int, int]]


def score_rows(model: LanguageModel, rows: Sequence[ScoredRow]) -> FloatArray:
    """Computes the log-probability of every span with an exported model.

    Rows have at most ``max_length`` + 1 ids. Returns float64[num_spans] in nats, in the order of
    the rows and their spans.
    """
    sums: list[float] = []
    for begin in range(0, len(rows), _ROWS_AT_A_TIME):
        part = rows[begin : begin + _ROWS_AT_A_TIME]
        for row, values in zip(part, model.log_probs([row.ids for row in part]), strict=True):
            sums += [float(values[first - 1 : last - 1].sum()) for first, last in row.spans]
    return np.array(sums, dtype=np.float64)


@dataclass(frozen=True)
class PackedRows:
    """Rows packed into the micro-batches of a run."""

    batches: Sequence[MicroBatch]  # all micro-batches, in order; the same at every layout
    num_spans: int  # number of spans of all rows

    @classmethod
    def build(
        cls,
        rows: Sequence[ScoredRow],
        *,
        seq_length: int,
        micro_batch_size: int,
        fill_id: int,
    ) -> "PackedRows":
        """Packs rows in order.

        Args:
            rows: The rows, of at most ``seq_length`` + 1 ids.
            seq_length: Number of tokens of a sample.
            micro_batch_size: A micro-batch holds this number times ``seq_length`` tokens.
            fill_id: Id of the tokens after the last row of a micro-batch.
        """
        num_tokens = micro_batch_size * seq_length
        batches, num_spans = [], 0
        for held in _bins(rows, num_tokens):
            batches.append(_pack(held, num_spans, num_tokens, fill_id))
            num_spans += sum(len(row.spans) for row in held)
        return cls(batches, num_spans)

    @staticmethod
    def num_batches(rows: Sequence[ScoredRow], num_tokens: int) -> int:
        """Returns the number of micro-batches of ``num_tokens`` tokens that hold the rows."""
        return len(_bins(rows, num_tokens))

    def log_probs(self, forward_step: ForwardStep, chunks: list[Any], ranks: Ranks) -> FloatArray:
        """Computes the log-probability of every span; every rank calls it.

        The data-parallel ranks share the micro-batches. Returns float64[num_spans] in nats, the
        same on every rank.
        """
        mine = self.batches[ranks.data_parallel_rank :: ranks.data_parallel_size]
        # Here the source of a token is its span.
        step = replace(forward_step, num_sources=self.num_spans, objective=None)
        sums = reduce_source_sums(sum_losses(mine, step, chunks, ranks), ranks)
        return (-sums[:, 0]).cpu().numpy()


def _bins(rows: Sequence[ScoredRow], num_tokens: int) -> list[list[ScoredRow]]:
    """Divides rows in order into bins of at most ``num_tokens`` tokens."""
    bins: list[list[ScoredRow]] = []
    filled = num_tokens
    for row in rows:
        if filled + len(row.ids) - 1 > num_tokens:
            bins.append([])
            filled = 0
        bins[-1].append(row)
        filled += len(row.ids) - 1
    return bins


def _pack(held: Sequence[ScoredRow], first_span: int, num_tokens: int, fill_id: int) -> MicroBatch:
    """Packs rows, whose spans are numbered from ``first_span``, and fills up without loss."""
    tokens = torch.full((1, num_tokens), fill_id, dtype=torch.int64)
    labels = torch.full_like(tokens, fill_id)
    loss_mask = torch.zeros(1, num_tokens)
    source = torch.zeros_like(tokens)
    bounds = [0]
    for row in held:
        begin, end = bounds[-1], bounds[-1] + len(row.ids) - 1
        ids = torch.tensor(list(row.ids))
        tokens[0, begin:end], labels[0, begin:end] = ids[:-1], ids[1:]
        for number, (first, last) in enumerate(row.spans, first_span):
            scored = slice(begin + first - 1, begin + last - 1)
            loss_mask[0, scored] = 1.0
            source[0, scored] = number
        first_span += len(row.spans)
        bounds.append(end)
    if bounds[-1] < num_tokens:
        bounds.append(num_tokens)
    return MicroBatch(
        tokens=tokens,
        labels=labels,
        loss_mask=loss_mask,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        source=source,
        sample_index=torch.zeros(1, dtype=torch.int64),
    )
