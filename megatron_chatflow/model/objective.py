"""Weights of the sources in the training objective.

The objective is ``sum(w[s] * loss of token) / sum(w[s])`` over the loss tokens of the global batch,
where s is the token's source. Schedules say how often a source is drawn; this says how much a drawn
token counts. `megatron_chatflow.blend.objective` computes the weights of each iteration.
"""

import torch

from megatron_chatflow.blend.objective import ObjectiveWeights


class Objective:
    """Weighs loss masks, and sums what the gradient has to be divided by.

    Only ratios of weights count. They are divided by the smallest one, because megatron-core 0.19
    divides gradients by at least 1.

    Attributes:
        weights: The weight of each source in the current step, as configured.

    Args:
        weights: The weight of each source, above 0, at every sample.
        device: The device of loss masks.
    """

    def __init__(self, weights: ObjectiveWeights, device: torch.device) -> None:
        self._schedule = weights
        self._device = device
        self.weights: list[float] = []
        self.begin_step(0)
        self._total = torch.zeros((), dtype=torch.float32, device=device)

    def begin_step(self, sample: int) -> None:
        """Sets the weights of the step whose global batch begins at a sample."""
        weights = self._schedule.at(sample)
        if weights != self.weights:
            self.weights = weights
            relative = [weight / min(weights) for weight in weights]
            self._relative = torch.tensor(relative, dtype=torch.float32, device=self._device)

    def weigh(self, loss_mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """Returns the weighted mask, and adds it to the sum unless gradients are disabled.

        Args:
            loss_mask: float32[tokens], 1 for tokens with loss.
            source: int64[tokens], index of each token's source.
        """
        weighted = loss_mask * self._relative[source]
        if torch.is_grad_enabled():  # validation is not part of the objective
            self._total += weighted.sum()
        return weighted

    def take_total(self) -> torch.Tensor:
        """Returns the sum of the weighted masks since the last call, float32."""
        total = self._total.clone()
        self._total.zero_()
        return total
