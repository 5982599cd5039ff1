"""Multiple-choice questions put to a model while it trains, at any parallel layout.

In: questions, and the model's chunks. Out: accuracies as `evaluate_choice` gives them for an
export. Each choice behind its question is a document of its own in a packed micro-batch, and a
source of its own in the sums that the model's forward pass takes: the negative sum of a choice's
losses is its log-probability. Nothing random is drawn and no weight changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_chatflow.data.loader import MicroBatch
from megatron_chatflow.evaluation.evaluate_choice import (
    ChoiceSettings,
    Question,
    encode_question,
    examples_for,
    question_row,
    tally,
)
from megatron_chatflow.evaluation.validation import reduce_source_sums, whole_groups
from megatron_chatflow.model.forward import ForwardStep
from megatron_chatflow.runtime.launch import device_mode
from megatron_chatflow.runtime.ranks import Ranks
from megatron_chatflow.tokenizer import Tokenizer


@dataclass(frozen=True)
class ChoiceValidator:
    """Questions, encoded and packed once for the whole run.

    Attributes:
        name: Of the questions in the logs.
        questions: The questions.
        settings: How they are put.
        batches: All micro-batches, in order.
        num_choices: Choices of all questions together.
    """

    name: str
    questions: Sequence[Question]
    settings: ChoiceSettings
    batches: Sequence[MicroBatch]
    num_choices: int

    @classmethod
    def build(
        cls,
        name: str,
        questions: Sequence[Question],
        settings: ChoiceSettings,
        *,
        tokenizer: Tokenizer,
        begins_with_bos: bool,
        seq_length: int,
        micro_batch_size: int,
    ) -> "ChoiceValidator":
        """Encodes questions, which begin as the model's texts do.

        Args:
            name: Of the questions in the logs.
            questions: The questions; also where solved examples come from.
            settings: How they are put.
            tokenizer: The run's.
            begins_with_bos: Whether the model's texts begin with BOS.
            seq_length: Tokens read at once: question and choice, but for the last.
            micro_batch_size: A micro-batch holds this times ``seq_length`` tokens.
        """
        beginning = [tokenizer.bos_id] if begins_with_bos else []
        rows: list[tuple[list[int], int]] = []
        for number, question in enumerate(questions):
            examples = examples_for(questions, number, questions, settings.num_few_shot)
            prompt, answers = encode_question(
                *(tokenizer, beginning, seq_length, question, examples, settings)
            )
            rows += [(question_row(prompt, ids, seq_length), len(ids)) for ids in answers]
        num_tokens = micro_batch_size * seq_length
        bins: list[list[int]] = []
        filled = num_tokens
        for number, (ids, _) in enumerate(rows):
            if filled + len(ids) - 1 > num_tokens:
                bins.append([])
                filled = 0
            bins[-1].append(number)
            filled += len(ids) - 1
        batches = [_pack(rows, held, num_tokens, tokenizer.eos_id) for held in bins]
        return cls(name, questions, settings, batches, len(rows))

    def run(self, forward_step: ForwardStep, chunks: list[Any], ranks: Ranks) -> dict[str, Any]:
        """Puts every question; every rank calls it and gets the same result."""
        sums = torch.zeros(self.num_choices, 3, dtype=torch.float64, device=ranks.device)
        mine = list(self.batches[ranks.data_parallel_rank :: ranks.data_parallel_size])
        if mine:
            for chunk in chunks:
                chunk.eval()
            results = self._forward(mine, forward_step, chunks, ranks)
            for chunk in chunks:
                chunk.train()
            if ranks.is_last_stage:
                sums = torch.stack(results).sum(dim=0)
        log_probs = iter((-reduce_source_sums(sums, ranks)[:, 0]).tolist())
        scores = [[next(log_probs) for _ in question.choices] for question in self.questions]
        return tally(self.questions, scores, self.settings)

    def _forward(
        self, batches: list[MicroBatch], forward_step: ForwardStep, chunks: list[Any], ranks: Ranks
    ) -> list[torch.Tensor]:
        batches = whole_groups(batches, len(chunks), ranks)
        with torch.no_grad(), device_mode(ranks.device):
            results: list[torch.Tensor] = get_forward_backward_func()(
                forward_step_func=replace(forward_step, num_sources=self.num_choices),
                data_iterator=[iter(batches) for _ in chunks],
                model=chunks,
                num_microbatches=len(batches),
                seq_length=batches[0].tokens.numel(),
                micro_batch_size=1,
                forward_only=True,
            )
        return results


def _pack(
    rows: Sequence[tuple[list[int], int]], held: Sequence[int], num_tokens: int, fill: int
) -> MicroBatch:
    """A micro-batch of documents; what is left over is a document without loss."""
    tokens = torch.full((1, num_tokens), fill, dtype=torch.int64)
    labels = torch.full_like(tokens, fill)
    loss_mask = torch.zeros(1, num_tokens)
    source = torch.zeros_like(tokens)
    bounds = [0]
    for number in held:
        ids, num_answer = rows[number]
        begin, end = bounds[-1], bounds[-1] + len(ids) - 1
        tokens[0, begin:end] = torch.tensor(ids[:-1])
        labels[0, begin:end] = torch.tensor(ids[1:])
        loss_mask[0, end - num_answer : end] = 1.0
        source[0, begin:end] = number
        bounds.append(end)
    if bounds[-1] < num_tokens:
        bounds.append(num_tokens)
    return MicroBatch(
        tokens=tokens,
        labels=labels,
        loss_mask=loss_mask,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=max(b - a for a, b in zip(bounds, bounds[1:], strict=False)),
        source=source,
        sample_index=torch.zeros(1, dtype=torch.int64),
    )
