"""What every rank does by itself and all have to succeed in, and how ranks are named together.

In: a step of this rank's own, such as opening its data. Out: its result, once every rank has one;
else a mistake is raised on every rank, so that none goes on alone into a collective.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from megatron_chatflow.errors import UserError

_Result = TypeVar("_Result")
_MOST_NAMED = 8


class PeerError(UserError):
    """Other ranks met a mistake and this one did not; they say it."""


def gather(value: Any) -> list[Any]:
    """Every rank's value, by rank; every rank calls it."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def in_agreement(step: Callable[[], _Result]) -> _Result:
    """Takes a step that calls no collective; every rank calls it.

    Raises:
        UserError: This rank's own mistake, with the ranks that met the same where not all did.
        PeerError: Others met one.
    """
    error: UserError | None = None
    try:
        result = step()
    except UserError as caught:
        error = caught
    mistakes = gather(None if error is None else str(error))
    if not any(mistakes):
        return result
    if error is None:
        first = next(mistake for mistake in mistakes if mistake)
        those = [rank for rank, mistake in enumerate(mistakes) if mistake]
        raise PeerError(f"{name_ranks(those)}: {first}")
    same = [rank for rank, mistake in enumerate(mistakes) if mistake == str(error)]
    if len(same) == len(mistakes):
        raise error
    raise UserError(f"{name_ranks(same)}: {error}") from error


def name_ranks(ranks: Sequence[int]) -> str:
    """``rank 3``, or ``ranks 0, 3, 4``, or the first few of many."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    more = f" and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else ""
    return f"ranks {', '.join(map(str, ranks[:_MOST_NAMED]))}{more}"
