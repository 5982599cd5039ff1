"""Documents as segments of text, and the reasons for which records are dropped.

These types are shared by `megatron_chatflow.preprocess` and by chat templates.
"""

from dataclasses import dataclass, field
from typing import Literal

SegmentKind = Literal["text", "control", "end"]


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a document that is with loss as a whole, or without.

    Attributes:
        text: The text; of a control token its name.
        loss: Whether its tokens are learnt.
        kind: "text"; "control", a token such as `<|im_start|>` that a tokenizer may have an id for
            (to one that has not, it is text); or "end", the tokenizer's end-of-sequence token.
    """

    text: str
    loss: bool
    kind: SegmentKind = "text"


@dataclass(frozen=True, slots=True)
class Document:
    """A document in segments.

    Attributes:
        segments: In order; a token never lies in two of them.
        cut_points: Numbers of leading segments after which an over-long document may be cut,
            ascending; empty where it may not.
    """

    segments: tuple[Segment, ...]
    cut_points: tuple[int, ...] = ()


class DroppedError(Exception):
    """A well-formed record that is left out by a filter; `reason` names the filter."""

    def __init__(self, reason: str) -> None:
        """Takes the name under which it is counted, such as "identical_sides"."""
        super().__init__(reason)
        self.reason = reason


class BadLineError(DroppedError):
    """A line that is not what its format asks for; too many of them end the run.

    Attributes:
        detail: The reason with what was found instead, for messages.
    """

    def __init__(self, reason: str, detail: str | None = None) -> None:
        """Takes the name under which it is counted, and what a message says instead of it."""
        super().__init__(reason)
        self.detail = detail or reason


class TemplateLimitError(BadLineError):
    """A chat for which its template runs for too long, or makes too much text."""

    def __init__(self, limit: str) -> None:
        """Takes the limit that was reached, such as "takes more than 10 seconds"."""
        super().__init__("template_limit", f"template_limit: the template {limit} for this chat")
        self.limit = limit


@dataclass
class ParsedChunk:
    """The documents of one chunk of input, and what was left out.

    Attributes:
        documents: For each output key, its documents: text alone, or segments.
        num_dropped: Lines left out, by reason, bad ones included.
        num_repaired: Documents kept after a repair, by kind.
        num_bad: Bad lines.
        first_bad: `file:line: reason` of the first of them.
    """

    documents: dict[str, list[str | Document]] = field(default_factory=dict)
    num_dropped: dict[str, int] = field(default_factory=dict)
    num_repaired: dict[str, int] = field(default_factory=dict)
    num_bad: int = 0
    first_bad: str | None = None
