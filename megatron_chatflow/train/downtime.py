"""What restarts have cost, as one value that every report carries; `restarts` keeps the records."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Downtime:
    """What restarts have cost.

    Attributes:
        num_restarts: How often the run was resumed, for whatever reason.
        seconds: Wall time between the last iteration that counts and each resume.
        num_failures: Those after the run was killed or failed, rather than stopped on request.
        failure_seconds: The wall time of these.
    """

    num_restarts: int = 0
    seconds: float = 0.0
    num_failures: int = 0
    failure_seconds: float = 0.0
