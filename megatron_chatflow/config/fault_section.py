"""What a run does when something goes wrong: the ``faults`` section of its configuration.

In: mappings as YAML gives them. Out: an immutable object, like those of `sections`.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from megatron_chatflow.config.fields import CONFIG, NonNegativeNumber, Size
from megatron_chatflow.config.units import parse_number

Factor = Annotated[float, BeforeValidator(parse_number), Field(gt=1, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class FaultConfig:
    """How a run answers bad steps, hung ranks and data that goes away."""

    on_nan: Literal["stop", "skip", "rollback"] = Field(
        default="stop",
        description=(
            "what a step whose loss or gradient is not finite, or whose loss is a spike, leads to: "
            "end the run; leave the update out; or take the weights of the last checkpoint and go "
            "on with the data that follows"
        ),
    )
    loss_spike_factor: Factor | None = Field(
        default=None,
        description="a loss above this multiple of the recent median is a spike; none when unset",
    )
    loss_spike_window: Size = Field(
        default=100, description="good steps whose median a spike is measured against"
    )
    max_bad_steps: Size = Field(
        default=10, description="bad steps in a row after which the run ends whatever --on-nan says"
    )
    hang_timeout_minutes: NonNegativeNumber | None = Field(
        default=None,
        description=(
            "minutes without progress after which a rank ends, its stacks written; 0: never; half "
            "of the distributed timeout when unset, which would end the healthy ranks first"
        ),
    )
    data_retry_seconds: NonNegativeNumber = Field(
        default=60.0, description="seconds in which a source that went away may come back"
    )
