"""Norms of the weights and of the gradients, of the whole model and of each layer.

Each rank sums the squares of what its optimizer holds, so that nothing is gathered: its shards with
the distributed optimizer, all of its weights otherwise. What several ranks hold counts once. One
reduction of a few numbers per layer follows.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_chatflow.checkpoint.megatron import ParameterShard
from megatron_chatflow.checkpoint.state import main_parameters, single
from megatron_chatflow.config import RunConfig
from megatron_chatflow.runtime.ranks import Ranks

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Norms:
    """L2 norms at one iteration."""

    params: float | None  # of all weights after the update; None if it is not logged
    # By layer, such as ``embedding``, ``layers.0``, ``final_norm`` and ``output`` (unless it is the
    # embedding): of the weights after the update, and of the gradients before clipping. None if
    # they are not logged.
    layers: Mapping[str, tuple[float, float]] | None


class NormMeter:
    """Measures the norms of the iterations in which it is `is_due`."""

    def __init__(
        self,
        optimizer: Any,
        parts: Mapping[torch.Tensor, list[ParameterShard]],
        config: RunConfig,
        ranks: Ranks,
    ) -> None:
        """Assigns this rank's parameters to layers.

        Args:
            optimizer: megatron-core's optimizer.
            parts: The shards of every parameter, by parameter.
            config: The configuration of the run, which says which norms are logged.
            ranks: This process's place in the job.
        """
        self.is_due = False
        self._is_tied = not config.model.untie_embeddings_and_output_weights
        self._logs = config.logging
        self.names = ["embedding", *(f"layers.{n}" for n in range(config.model.num_layers))]
        self.names += ["final_norm", "output"]
        self._device = ranks.device
        self._grads: torch.Tensor | None = None
        self._held: list[tuple[int, torch.Tensor]] = []
        is_first = ranks.data_parallel_rank == ranks.context_parallel_rank == 0
        for one in single(optimizer):
            for parameter, main, _, is_sharded in main_parameters(one):
                is_counted = param_is_not_shared(parameter)
                is_counted &= param_is_not_tensor_parallel_duplicate(parameter)
                if is_counted and (is_sharded or is_first):
                    self._held.append((self._number(parts[parameter][0]), main))

    def _number(self, part: ParameterShard) -> int:
        """Returns the index in `names` of a parameter's layer."""
        if part.layer is not None:
            return 1 + part.layer
        found = _LAYER.match(part.name)
        if found is not None:
            return 1 + int(found[1])
        kinds = {"embedding": 0, "output_layer": -1}
        return kinds.get(part.name.split(".")[0], -2) % len(self.names)

    def observe_gradients(self) -> None:
        """Sums the squares of the gradients; called when they are reduced and not yet clipped."""
        if not self.is_due:
            return
        grads = []
        for number, main in self._held:
            grad = getattr(main, "decoupled_grad", None)
            grad = main.grad if grad is None else grad
            if grad is not None:
                grads.append((number, grad))
        self._grads = self._squares(grads)

    def measure(self) -> Norms | None:
        """Returns the norms of an iteration after its update, if due; every rank calls it."""
        if not self.is_due or self._grads is None:
            return None
        squares = torch.stack((self._squares(self._held), self._grads))
        self._grads = None
        torch.distributed.all_reduce(squares)
        weights, grads = squares.sqrt().tolist()
        layers = dict(zip(self.names, zip(weights, grads, strict=True), strict=True))
        if self._is_tied:
            del layers["output"]
        return Norms(
            math.sqrt(float(squares[0].sum())) if self._logs.log_params_norm else None,
            layers if self._logs.log_layer_norms else None,
        )

    def _squares(self, tensors: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
        """Returns the sum of squares of each layer's tensors, float64[num_names]."""
        sums = torch.zeros(len(self.names), dtype=torch.float64, device=self._device)
        if tensors:
            held = [tensor.detach() for _, tensor in tensors]
            norms = torch._foreach_norm(held, 2, torch.float32)
            squares = torch.stack([n.to(self._device, torch.float64) for n in norms]).square()
            numbers = torch.tensor([number for number, _ in tensors], device=self._device)
            sums.index_add_(0, numbers, squares)
        return sums
