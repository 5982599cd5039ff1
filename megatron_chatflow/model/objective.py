"""Weights of the sources in the training objective.

The objective is ``sum(w[s] * loss of token) / sum(w[s])`` over the loss tokens of the global batch,
where s is the token's source. Schedules say how often a source is drawn; this says how much a drawn
token counts.
"""

from collections.abc import Sequence

import torch


class Objective:
    """Weighs loss masks, and sums what the gradient has to be divided by.

    Only ratios of weights count. They are divided by the smallest one, because megatron-core 0.19
    divides gradients by at least 1.

    Args:
        weights: The weight of each source, above 0.
        device: The device of loss masks.
    """

    def __init__(self, weights: Sequence[float], device: torch.device) -> None:
        relative = [weight / min(weights) for weight in weights]
        self._weights = torch.tensor(relative, dtype=torch.float32, device=device)
        self._total = torch.zeros((), dtype=torch.float32, device=device)

    def weigh(self, loss_mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """Returns the weighted mask, and adds it to the sum unless gradients are disabled.

        Args:
            loss_mask: float32[tokens], 1 for tokens with loss.
            source: int64[tokens], index of each token's source.
        """
        weighted = loss_mask * self._weights[source]
        if torch.is_grad_enabled():  # validation is not part of the objective
            self._total += weighted.sum()
        return weighted

    def take_total(self) -> torch.Tensor:
        """Returns the sum of the weighted masks since the last call, float32."""
        total = self._total.clone()
        self._total.zero_()
        return total
