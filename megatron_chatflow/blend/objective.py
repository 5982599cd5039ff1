"""The weight of each source in the training objective along the knots of the schedule.

The schedule's weights say how often a source is drawn; these say how much a drawn token counts.
`megatron_chatflow.model.objective` applies them.
"""

import math
from itertools import pairwise

from megatron_chatflow.blend.schedule import Positions
from megatron_chatflow.config import DataConfig


class ObjectiveWeights:
    """The weight of each source in the objective at every sample.

    At a knot, a source has its weight in the knot's ``objective_weights`` if it is named there, and
    its own ``objective_weight`` otherwise. Weights are constant before the first and after the last
    knot, and change between knots as the ramp says, without the rounding of the schedule's weights.
    A knot with ``weights: as_planned`` is a knot like any other here: only the future is computed.
    """

    def __init__(self, data: DataConfig, positions: Positions) -> None:
        self.sources = tuple(data.sources)
        own = {name: source.objective_weight for name, source in data.sources.items()}
        self._knots = [
            (
                positions.to_sample(knot.at, f"data.schedule.knots[{number}]"),
                list({**own, **(knot.objective_weights or {})}.values()),
                knot.ramp,
            )
            for number, knot in enumerate(data.schedule.knots)
        ]

    @property
    def are_equal(self) -> bool:
        """Whether all tokens count alike throughout the run."""
        return all(len(set(weights)) == 1 for _, weights, _ in self._knots)

    @property
    def are_constant(self) -> bool:
        """Whether the weights are the same throughout the run."""
        return all(weights == self._knots[0][1] for _, weights, _ in self._knots)

    def is_on_cosine_ramp(self, sample: int) -> bool:
        """Whether a cosine ramp contains this sample, so that a knot here starts another one."""
        return any(
            ramp == "cosine" and begin < sample < end and first != last
            for (begin, first, _), (end, last, ramp) in pairwise(self._knots)
        )

    def samples_before(self, sample: int) -> list[int]:
        """Returns the samples of the knots in [0, ``sample``), ascending."""
        return [at for at, _, _ in self._knots if 0 <= at < sample]

    def to_list(self) -> list[list[object]]:
        """Returns sample, weights and ramp of every knot, to compare them between ranks."""
        return [list(knot) for knot in self._knots]

    def at(self, sample: int) -> list[float]:
        """Returns the weights of an iteration whose first sample this is, in order of sources."""
        if sample < self._knots[0][0]:
            return self._knots[0][1]
        for (begin, first, _), (end, last, ramp) in pairwise(self._knots):
            if begin <= sample < end:
                place = 0.0 if ramp == "step" else (sample - begin) / (end - begin)
                if ramp == "cosine":
                    place = (1 - math.cos(math.pi * place)) / 2
                return [a + (b - a) * place for a, b in zip(first, last, strict=True)]
        return self._knots[-1][1]
