"""Objects that ranks of one simulated job exchange, when all of its ranks are simulated.

A rank that is simulated alone takes its own objects for those of all ranks. That is not enough for
checkpoints: rank 0 waits for the reports of all ranks, and loading compares what all of them read.
Ranks of a small job can therefore be simulated side by side, as processes that share a key-value
store. Tensors are still not exchanged.
"""

import pickle
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_chatflow.checkpoint import store
from megatron_chatflow.runtime.ranks import gather_objects

_TIMEOUT = timedelta(minutes=5)


class ObjectExchange:
    """The object collectives of `torch.distributed` over a store.

    Args:
        objects: The store of the job.
        rank: This process's rank.
    """

    def __init__(self, objects: Any, rank: int) -> None:
        self._store = objects
        self._store.set_timeout(_TIMEOUT)
        self._rank = rank
        self._num_calls: Counter[tuple[int, ...]] = Counter()

    def install(self) -> None:
        """Replaces these functions and two of `checkpoint.store`, in this process and for good.

        Ranks of a save agree by a number on the GPU, which has no value here.
        """
        for function in (
            self.all_gather_object,
            self.broadcast_object_list,
            self.gather_object,
            self.scatter_object_list,
        ):
            setattr(dist, function.__name__, function)
            setattr(distributed_c10d, function.__name__, function)
        saves: Any = store
        saves.draw_job_id = partial(_draw_job_id, saves.draw_job_id)
        saves._all_ranks_succeeded = partial(_all_ranks_succeeded, saves._all_ranks_succeeded)

    def _gather(self, value: Any, group: Any) -> dict[int, Any]:
        """Returns the values of all ranks of a group, by rank."""
        ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
        number = self._num_calls[ranks]
        self._num_calls[ranks] += 1
        keys = {rank: f"objects/{ranks}/{number}/{rank}" for rank in ranks}
        self._store.set(keys[self._rank], pickle.dumps(value))
        return {rank: pickle.loads(self._store.get(key)) for rank, key in keys.items()}

    def all_gather_object(self, object_list: list[Any], obj: Any, group: Any = None) -> None:
        """Replaces ``torch.distributed.all_gather_object``."""
        object_list[:] = self._gather(obj, group).values()

    def broadcast_object_list(
        self,
        object_list: list[Any],
        src: int | None = None,
        group: Any = None,
        device: Any = None,
        group_src: int | None = None,
    ) -> None:
        """Replaces ``torch.distributed.broadcast_object_list``."""
        object_list[:] = self._gather(object_list, group)[_global_rank(group, src, group_src)]

    def gather_object(
        self,
        obj: Any,
        object_gather_list: list[Any] | None = None,
        dst: int | None = None,
        group: Any = None,
        group_dst: int | None = None,
    ) -> None:
        """Replaces ``torch.distributed.gather_object``."""
        values = self._gather(obj, group)
        if self._rank == _global_rank(group, dst, group_dst):
            assert object_gather_list is not None
            object_gather_list[:] = values.values()

    def scatter_object_list(
        self,
        scatter_object_output_list: list[Any],
        scatter_object_input_list: list[Any] | None = None,
        src: int | None = None,
        group: Any = None,
        group_src: int | None = None,
    ) -> None:
        """Replaces ``torch.distributed.scatter_object_list``."""
        lists = self._gather(scatter_object_input_list, group)
        place = dist.get_rank(group or dist.group.WORLD)
        scatter_object_output_list[0] = lists[_global_rank(group, src, group_src)][place]


def _draw_job_id(draw: Callable[[torch.device], str], device: torch.device) -> str:
    drawn = [draw(device)]
    dist.broadcast_object_list(drawn, src=0)
    return drawn[0]


def _all_ranks_succeeded(
    agree: Callable[[bool, torch.device], bool], succeeded: bool, device: torch.device
) -> bool:
    agree(succeeded, device)
    return all(gather_objects(succeeded))


def _global_rank(group: Any, rank: int | None, group_rank: int | None) -> int:
    if group_rank is None:
        return rank or 0
    world: Any = dist.group.WORLD
    return dist.get_global_rank(group or world, group_rank)
