"""The blend: which source every sample of a run comes from, as its schedule says.

`Schedule` gives each source a weight at every sample, `Blend` turns it into an exact sequence.
Start with `blend.py`; `engine.py` explains the algorithm, `edits.py` how a running schedule may
change.
"""

from megatron_chatflow.blend.blend import Blend
from megatron_chatflow.blend.schedule import Schedule

__all__ = ["Blend", "Schedule"]
