"""One training step: gradients of a global batch, the update, and the sums that the log reports.

In: this rank's micro-batches. Out: `StepResult`. The loss is summed over the global batch's loss
tokens and divided by their number, so it does not depend on how the batch was cut.
"""

from dataclasses import dataclass

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_chatflow.data.loader import GlobalBatch
from megatron_chatflow.evaluation.validation import reduce_source_sums
from megatron_chatflow.model.forward import ForwardStep
from megatron_chatflow.runtime.launch import device_mode
from megatron_chatflow.runtime.ranks import Ranks
from megatron_chatflow.train.guard import Guard, Verdict
from megatron_chatflow.train.optimizer import Optimization
from megatron_chatflow.train.profiler import Mark, no_mark


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Attributes:
        source_sums: float64[num_sources, 3] on the CPU: summed loss, loss tokens and bytes of each
            source over the global batch; the same on every rank.
        grad_norm: Norm of the whole gradient before clipping.
        learning_rate: The rate that the update used.
        verdict: Whether the update was made; the same on every rank.
    """

    source_sums: torch.Tensor
    grad_norm: float
    learning_rate: float
    verdict: Verdict

    @property
    def loss(self) -> float | None:
        """Mean loss of the global batch's loss tokens, in nats; None if it had none."""
        loss_sum, num_tokens, _ = self.source_sums.sum(dim=0).tolist()
        return loss_sum / num_tokens if num_tokens else None


def train_step(
    batch: GlobalBatch,
    optimization: Optimization,
    forward_step: ForwardStep,
    ranks: Ranks,
    guard: Guard,
    mark: Mark = no_mark,
) -> StepResult:
    """Takes one step, or leaves its update out where the guard says so; every rank calls it.

    Megatron-LM counts a step without an update as an iteration but keeps its learning rate where it
    was. Here the learning rate goes on with the samples, whatever became of the update, so that it
    is the same after a resume.

    Args:
        batch: This rank's micro-batches of the global batch.
        optimization: Chunks, optimizer and learning rate; all change.
        forward_step: How a micro-batch runs.
        ranks: This process's place.
        guard: Judges the step before its update.
        mark: Names the step's parts for a profile.
    """
    for chunk in optimization.chunks:
        chunk.zero_grad_buffer()
    optimization.optimizer.zero_grad()
    with mark("forward and backward"), device_mode(ranks.device):
        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            # Every model chunk runs every micro-batch.
            data_iterator=[iter(batch.micro_batches) for _ in optimization.chunks],
            model=optimization.chunks,
            num_microbatches=len(batch.micro_batches),
            # A micro-batch is one row of packed tokens.
            seq_length=batch.micro_batches[0].tokens.numel(),
            micro_batch_size=1,
            forward_only=False,
        )
    if ranks.is_last_stage:
        sums = torch.stack(results).sum(dim=0)
    else:
        sums = torch.zeros(forward_step.num_sources, 3, dtype=torch.float64, device=ranks.device)
    sums = reduce_source_sums(sums, ranks).cpu()
    rows = sums.tolist()
    learning_rate = optimization.learning_rate()
    with mark("optimizer"), device_mode(ranks.device):
        verdict, grad_norm = optimization.update.step(lambda norm: guard.judge(rows, norm))
    optimization.advance(batch.end - batch.begin)
    return StepResult(sums, grad_norm, learning_rate, verdict)
