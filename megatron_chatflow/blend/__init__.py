"""The blend: determines the source of every sample of a run.

    schedule = Schedule.from_dict(block, sources=[...], samples_per_iteration=512, seq_length=4096)
    source, index = Blend(schedule).take(begin, end)

A `Schedule` gives every source an integer weight at every sample. A `Blend` turns the schedule into
an exact sequence: global sample i is the ``index[i]``-th sample of source ``source[i]``, and for
every prefix and source the count differs from the sum of the weights by less than 1. The modules,
in the recommended reading order:

- `schedule`: knots, ramps and their parser; weights as exact integers.
- `quota`: sums of weights and their inverses in closed form.
- `engine`: the algorithm and its proof idea, with a reference in Python. The C++ in ``csrc/blend``
  draws the same sequence.
- `blend`: `Blend`, which joins the engines of all segments and saves its state.
- `edits`: the changes that a resumed run may make to its schedule, and the segments they start.
- `adaptive`: a blend with weights that are determined during the run.
- `controllers`: decide these weights from losses.
- `objective`: the weights of the sources in the training objective.
- `plan`: planned and realised mixture, epochs per source, and limits on them.
"""

from megatron_chatflow.blend.blend import Blend
from megatron_chatflow.blend.schedule import Schedule

__all__ = ["Blend", "Schedule"]
