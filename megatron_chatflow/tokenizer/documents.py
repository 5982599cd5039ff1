"""Documents as segments of text, and the errors that drop a record.

`megatron_chatflow.preprocess` and the chat templates share these types.
"""

from dataclasses import dataclass, field
from typing import Literal

SegmentKind = Literal["text", "control", "end"]


@dataclass(frozen=True, slots=True)
class Segment:
    """A contiguous part of a document with one loss setting."""

    text: str  # the text, or the name of a control token
    loss: bool  # whether the segment's tokens contribute to the loss
    # "text"; "control" for a control token such as `<|im_start|>`, which is encoded as text if the
    # tokenizer has no id for it; or "end" for the tokenizer's end-of-sequence token
    kind: SegmentKind = "text"


@dataclass(frozen=True, slots=True)
class Document:
    """A document as a sequence of segments."""

    segments: tuple[Segment, ...]  # The segments in order. A token never spans two segments.
    # Ascending numbers of leading segments after which a document that is too long may be cut.
    # Empty if the document may not be cut.
    cut_points: tuple[int, ...] = ()
    # Texts that identify the document instead of its own text: it repeats an earlier document that
    # has one of them. All documents of a dataset have the same number.
    keys: tuple[str, ...] = ()


class DroppedError(Exception):
    """Raised for a well-formed record that a filter excludes. `reason` names the filter."""

    def __init__(self, reason: str) -> None:
        """Sets the name under which the record is counted, such as "identical_sides"."""
        super().__init__(reason)
        self.reason = reason


class BadLineError(DroppedError):
    """Raised for a line that violates its format. Too many bad lines end the run.

    `detail` replaces `reason` in messages.
    """

    def __init__(self, reason: str, detail: str | None = None) -> None:
        super().__init__(reason)
        self.detail = detail or reason


class TemplateLimitError(BadLineError):
    """Raised if the template runs too long, or produces too much text, for a chat."""

    def __init__(self, limit: str) -> None:
        """Sets the limit that was exceeded, such as "takes more than 10 seconds"."""
        super().__init__("template_limit", f"template_limit: the template {limit} for this chat")
        self.limit = limit


@dataclass
class ParsedChunk:
    """The documents of one chunk of input and the statistics of its parsing."""

    # the documents of each output key, as plain text or as segments
    documents: dict[str, list[str | Document]] = field(default_factory=dict)
    # number of dropped lines by reason, including bad lines
    num_dropped: dict[str, int] = field(default_factory=dict)
    # number of documents that were repaired and kept, by kind of repair
    num_repaired: dict[str, int] = field(default_factory=dict)
    num_bad: int = 0  # number of bad lines
    # number of bad lines by reason; other dropped lines, such as headers, are not records
    bad_lines: dict[str, int] = field(default_factory=dict)
    first_bad: str | None = None  # `file:line: reason` of the first bad line, or None
