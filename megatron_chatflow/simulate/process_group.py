"""A job of any size in one process: torch's ``fake`` backend, and what goes over it.

Collectives return at once and leave tensors as they are. Objects that ranks exchange are this
rank's own, as if all ranks were alike.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, distributed_c10d
from torch.testing._internal.distributed import fake_pg  # registers the backend  # noqa: F401
from torch.utils._pytree import tree_leaves

from megatron_chatflow.simulate.device import DEVICES_PER_NODE
from megatron_chatflow.simulate.recorder import Recorder

_names: dict[str, str] = {}  # what each group is for, by its name in torch
_finished: list[Any] = []  # the work that every collective returns

# Position of the group among an operator's arguments, and of the tensors that are exchanged: those
# of the whole group's result for gathers, of the whole input for scatters.
_COLLECTIVES = {
    "allreduce_": ("all-reduce", 1, 0),
    "allreduce_coalesced_": ("all-reduce", 1, 0),
    "broadcast_": ("broadcast", 1, 0),
    "reduce_": ("reduce", 1, 0),
    "send": ("send", 1, 0),
    "recv_": ("receive", 1, 0),
    "barrier": ("barrier", 1, 0),
    "allgather_": ("all-gather", 2, 0),
    "_allgather_base_": ("all-gather", 2, 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 2, 0),
    "reduce_scatter_": ("reduce-scatter", 2, 1),
    "_reduce_scatter_base_": ("reduce-scatter", 2, 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 2, 1),
    "alltoall_": ("all-to-all", 2, 1),
    "alltoall_base_": ("all-to-all", 2, 1),
}


def _ring_factor(collective: str, size: int) -> float:
    """Returns the share of the bytes that a rank of a ring sends."""
    if collective == "all-reduce":
        return 2 * (size - 1) / size
    if collective in ("all-gather", "reduce-scatter", "all-to-all"):
        return (size - 1) / size
    return 1.0 if collective in ("send", "broadcast", "reduce") and size > 1 else 0.0


def record_collective(recorder: Recorder, func: Any, args: Sequence[Any]) -> None:
    """Accounts for an operator of ``c10d``."""
    known = _COLLECTIVES.get(func._opname)
    if known is None:
        return
    collective, group_position, tensor_position = known
    group = ProcessGroup.unbox(args[group_position])
    tensors = [
        leaf for leaf in tree_leaves(args[tensor_position]) if isinstance(leaf, torch.Tensor)
    ]
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    wire_bytes = num_bytes * _ring_factor(collective, group.size())
    recorder.add_message(_label(group), collective, num_bytes, wire_bytes)


def finished_work() -> Any:
    """Returns the work of a collective that has nothing to wait for."""
    if not _finished:
        _finished.append(dist.all_reduce(torch.zeros(1), async_op=True))
    return _finished[0]


def _label(group: ProcessGroup) -> str:
    name = group.group_name
    return f"{_names.get(name, 'other')} ({group.size()})"


def name_groups() -> None:
    """Gives megatron-core's groups, which must exist, the names of what they are for.

    Some of them are one and the same, such as the data-parallel group with and without context
    parallelism; the first name counts.
    """
    from megatron.core import parallel_state as state

    groups = {
        "tensor": state.get_tensor_model_parallel_group,
        "pipeline": state.get_pipeline_model_parallel_group,
        "context": state.get_context_parallel_group,
        "data": lambda: state.get_data_parallel_group(with_context_parallel=True),
        "data without context": state.get_data_parallel_group,
        "embedding": lambda: state.get_embedding_group(check_initialized=False),
        "model": state.get_model_parallel_group,
        "optimizer": state.get_intra_distributed_optimizer_instance_group,
    }
    _names.clear()
    world = dist.group.WORLD
    if world is not None:
        _names[world.group_name] = "world"
    for name, get in groups.items():
        group = get()
        if isinstance(group, ProcessGroup):
            _names.setdefault(group.group_name, name)


def join(rank: int, world_size: int, store: Any = None) -> None:
    """Joins a job of ``world_size`` ranks as ``rank``, in the way that torchrun starts one.

    Groups that are created later use the same backend, whatever they ask for.

    Args:
        rank: This process's rank.
        world_size: Number of ranks.
        store: A key-value store that ranks share; None for one of this rank's own.
    """
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank % DEVICES_PER_NODE),
        LOCAL_WORLD_SIZE=str(min(DEVICES_PER_NODE, world_size)),
    )
    dist.init_process_group(
        "fake",
        rank=rank,
        world_size=world_size,
        store=store or dist.HashStore(),  # type: ignore[attr-defined]
        timeout=timedelta(minutes=10),
    )
    new_group = dist.new_group

    def new_fake_group(
        ranks: Any = None,
        timeout: Any = None,
        backend: Any = None,
        pg_options: Any = None,
        **rest: Any,
    ) -> Any:
        return new_group(ranks, timeout=timeout, backend="fake", **rest)

    def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
        object_list[:] = [obj] * len(object_list)

    def gather_object(
        obj: Any, object_gather_list: list[Any] | None = None, *_: Any, **__: Any
    ) -> None:
        if object_gather_list is not None:
            all_gather_object(object_gather_list, obj)

    def scatter_object_list(
        scatter_object_output_list: list[Any],
        scatter_object_input_list: list[Any] | None = None,
        src: int | None = None,
        group: Any = None,
        group_src: int | None = None,
    ) -> None:
        if scatter_object_input_list is not None:
            scatter_object_output_list[0] = scatter_object_input_list[dist.get_rank(group)]

    def keep_objects(object_list: list[Any], *_: Any, **__: Any) -> None:
        """Leaves this rank's objects as they are."""

    def batch_isend_irecv(p2p_op_list: list[Any]) -> list[Any]:
        """Starts each by itself: the fake backend of older torch cannot coalesce them."""
        return [one.op(one.tensor, one.peer, one.group, one.tag) for one in p2p_op_list]

    replaced: dict[str, Any] = {
        "new_group": new_fake_group,
        "batch_isend_irecv": batch_isend_irecv,
        "all_gather_object": all_gather_object,
        "broadcast_object_list": keep_objects,
        "gather_object": gather_object,
        "scatter_object_list": scatter_object_list,
    }
    for name, function in replaced.items():
        setattr(dist, name, function)
        setattr(distributed_c10d, name, function)
