"""What restarts have cost a run, as one value.

In: the records that `restarts` keeps. Out: `Downtime`, which every report carries.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Downtime:
    """What restarts have cost.

    Attributes:
        num_restarts: How often the run was taken up again.
        seconds: Wall time lost to it.
    """

    num_restarts: int = 0
    seconds: float = 0.0
