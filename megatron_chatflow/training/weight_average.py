"""An exponential moving average of the weights, kept beside the optimizer's master weights.

After every update ``average += (1 - decay) * (weight - average)``, in fp32. Each rank averages the
master weights that its optimizer holds: with the distributed optimizer its shard, at 4 bytes per
weight of the shard. An average starts as a copy of the weights. It is evaluated by exchanging it
with the master weights, so that no further copy of the model is needed.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_chatflow.checkpoint.state import AVERAGE, LocalState, main_parameters, single


class WeightAverage:
    """The average of the weights that this rank's optimizer holds."""

    def __init__(self, optimizer: Any, decay: float) -> None:
        """Starts the average at the present weights.

        Args:
            optimizer: megatron-core's optimizer with fp32 master weights, or a chain of them.
            decay: Share of the average that an update keeps, in (0, 1).
        """
        self.decay = decay
        self._optimizers = single(optimizer)
        held = [entry for one in self._optimizers for entry in main_parameters(one)]
        self._masters = [main.detach() for _, main, _, _ in held]
        self._values = [main.clone() for main in self._masters]
        # The optimizer state that checkpoints store: the averages, not copies of them.
        self.states = [
            LocalState(parameter, begin, {AVERAGE: values}, is_sharded)
            for (parameter, _, begin, is_sharded), values in zip(held, self._values, strict=True)
        ]

    def restart(self) -> None:
        """Starts the average anew at the present weights."""
        for values, master in zip(self._values, self._masters, strict=True):
            values.copy_(master)

    def update(self) -> None:
        """Averages the weights of an update."""
        if self._values:
            torch._foreach_lerp_(self._values, self._masters, 1 - self.decay)

    @contextlib.contextmanager
    def applied(self, gather: Callable[[], None]) -> Iterator[None]:
        """Gives the model the averaged weights inside a ``with`` block; every rank calls it.

        Afterwards the model and its master weights have the same bits as before. After an error
        they do not: the other ranks may be elsewhere, so that nothing may be exchanged, and the run
        ends. ``gather`` exchanges the weights that the distributed optimizer has written to its
        shards.
        """
        self._exchange(gather)
        yield
        self._exchange(gather)

    def _exchange(self, gather: Callable[[], None]) -> None:
        for values, master in zip(self._values, self._masters, strict=True):
            other = master.clone()
            master.copy_(values)
            values.copy_(other)
        for one in self._optimizers:
            # The weights of the plain fp32 optimizer are the model's own.
            if hasattr(one, "_copy_main_params_to_model_params"):
                one._copy_main_params_to_model_params()
        gather()
