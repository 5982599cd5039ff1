"""What a preprocessing job is asked to do.

In: nothing. Out: `PreprocessSettings`, which workers receive whole.
"""

from dataclasses import dataclass, field
from typing import Literal

from megatron_chatflow.corpus.parse import CorpusSettings


@dataclass(frozen=True)
class PreprocessSettings:
    """A job.

    Attributes:
        inputs: Files, globs, folders, or `-` for standard input.
        output_prefix: Path that the outputs' names begin with.
        tokenizer_model: File or folder.
        tokenizer_type: One of `TOKENIZER_TYPES`, or "auto".
        corpus: What the inputs are.
        append_eod: Whether every document ends with the end-of-document token.
        max_tokens: Longest document of pairs and chats; None for no limit.
        over_long: What becomes of a longer one: cut at the end of a turn, or dropped.
        num_workers: Threads or processes that tokenise; with 1 it is the caller's own.
        max_bad_lines: So many bad lines are dropped before the job fails.
        overwrite: Whether outputs that exist are replaced.
    """

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer_model: str
    tokenizer_type: str = "auto"
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    append_eod: bool = False
    max_tokens: int | None = None
    over_long: Literal["truncate", "drop"] = "truncate"
    num_workers: int = 1
    max_bad_lines: int = 100
    overwrite: bool = False
