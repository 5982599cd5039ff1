"""The optimizer's state as shards of tensors, whichever of megatron-core's optimizers holds it.

In: an optimizer and where the model's parameters lie in the whole model. Out: shards named
``optimizer.state.<what>.<weight>``, which the saver writes and a load fills in place, and the
number of steps. The plain and the distributed optimizer give the same names and values, so that
each reads what the other wrote, at any layout; nothing is gathered, each rank names what it holds.
Under fp32 the weights are their own master weights, and only the moments are stored.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_chatflow.checkpoint.layout import (
    TensorShard,
    UnpaddedSizes,
    boxes_of_range,
    unpadded_shard,
)
from megatron_chatflow.checkpoint.megatron import ParameterShard
from megatron_chatflow.checkpoint.reader import SafeReader, fill
from megatron_chatflow.errors import UserError

MASTER = "fp32_param"
PREFIX = "optimizer.state."


@dataclass(frozen=True)
class LocalState:
    """What this rank's optimizer holds of a parameter.

    Attributes:
        parameter: The model's.
        begin: The first value of the flattened parameter whose state this is.
        tensors: The state by name, as many values each.
        is_sharded: Whether the other data-parallel ranks hold the other values; if not, all hold
            the same ones.
    """

    parameter: torch.Tensor
    begin: int
    tensors: dict[str, torch.Tensor]
    is_sharded: bool


def local_states(optimizer: Any) -> list[LocalState]:
    """Everything that this rank's optimizer holds; moments that are not there yet are made, as 0.

    Args:
        optimizer: megatron-core's plain, mixed-precision or distributed one, or a chain of them.
    """
    return [state for one in _single(optimizer) for state in _states_of_one(one)]


def _single(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _states_of_one(optimizer: Any) -> Iterator[LocalState]:
    inner = optimizer.optimizer
    optimizer.init_state_fn(inner, optimizer.config)
    for parameter, main, begin, is_sharded in _main_parameters(optimizer):
        tensors = {
            name: value
            for name, value in inner.state[main].items()
            if isinstance(value, torch.Tensor) and value.shape == main.shape and name != "step"
        }
        if parameter.dtype != torch.float32:
            tensors[MASTER] = main.detach()
        yield LocalState(parameter, begin, tensors, is_sharded)


def _main_parameters(optimizer: Any) -> Iterator[tuple[Any, Any, int, bool]]:
    """The model's parameter, the optimizer's own of it, where that begins, whether it is cut."""
    if hasattr(optimizer, "gbuf_ranges"):
        for model_groups, main_groups in (
            (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
            (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
        ):
            for parameter, main in _pairs(model_groups, main_groups):
                kept = optimizer._get_model_param_range_map(parameter)["param"]
                yield parameter, main, kept.start, True
    elif hasattr(optimizer, "float16_groups"):
        for model_groups, main_groups in (
            (optimizer.float16_groups, optimizer.fp32_from_float16_groups),
            (optimizer.fp32_from_fp32_groups, optimizer.fp32_from_fp32_groups),
        ):
            for parameter, main in _pairs(model_groups, main_groups):
                yield parameter, main, 0, False
    else:
        for parameter in optimizer.get_parameters():
            yield parameter, parameter, 0, False


def _pairs(groups: list[list[Any]], others: list[list[Any]]) -> Iterator[tuple[Any, Any]]:
    for group, other in zip(groups, others, strict=True):
        yield from zip(group, other, strict=True)


def master_weights(optimizer: Any) -> dict[torch.Tensor, tuple[int, torch.Tensor]]:
    """This rank's fp32 master weights by parameter; fp32 parameters are their own and left out.

    Returns:
        For each parameter the first value of the flattened parameter that this rank's optimizer
        holds, and its values from there on.
    """
    return {
        parameter: (begin, main.detach())
        for one in _single(optimizer)
        for parameter, main, begin, _ in _main_parameters(one)
        if parameter.dtype != torch.float32
    }


def state_shards(state: LocalState, parts: list[ParameterShard]) -> list[TensorShard]:
    """A parameter's state as shards of the whole model's tensors, not copied.

    Args:
        state: What the optimizer holds.
        parts: Where the parameter lies, in the order of its values.
    """
    shards = []
    num_values = next(iter(state.tensors.values())).numel()
    for part in parts:
        begin = max(state.begin, part.begin)
        end = min(state.begin + num_values, part.begin + part.num_values)
        at = begin - state.begin
        for offsets, sizes in boxes_of_range(begin - part.begin, end - part.begin, part.shape):
            length = torch.Size(sizes).numel()
            shards += [
                TensorShard(
                    f"{PREFIX}{what}.{part.name}",
                    part.global_shape,
                    part.offsets_of(offsets),
                    part.sizes_of(sizes),
                    values.view(-1)[at : at + length],
                    part.may_differ,
                )
                for what, values in state.tensors.items()
            ]
            at += length
    return shards


def common_state(optimizer: Any) -> dict[str, Any]:
    """What is the same on every rank, in the form of megatron-core's mixed-precision optimizer."""
    groups = [
        {name: value for name, value in group.items() if name != "params"}
        for one in _single(optimizer)
        for group in one.optimizer.param_groups
    ]
    return {"optimizer": {"param_groups": groups, "state": {}}}


@dataclass(frozen=True)
class Layout:
    """How this rank's parameters lie in a checkpoint.

    Attributes:
        parts: By parameter.
        unpadded_sizes: Of matrices with padded heads, which are not in it.
    """

    parts: Mapping[torch.Tensor, list[ParameterShard]]
    unpadded_sizes: UnpaddedSizes


def load(
    optimizer: Any,
    layout: Layout,
    common: Any,
    folder: Path,
    reader: FileSystemReader | None,
) -> None:
    """Fills what this rank's optimizer holds, in place and with no message to other ranks.

    Everything else in the optimizer's groups follows from the run's configuration.

    Args:
        optimizer: megatron-core's.
        layout: Where the model's parameters lie.
        common: The common state of the optimizer that was saved, of any kind and version.
        folder: An ``iter_`` folder.
        reader: Reads it; None for what lies there as it is.

    Raises:
        UserError: The checkpoint holds no such state, or is damaged.
    """
    reader = reader or SafeReader(folder)
    names = reader.read_metadata().state_dict_metadata
    shards = [
        replace(shard, name=_stored_name(shard.name, names))
        for held in local_states(optimizer)
        for shard in state_shards(held, layout.parts[held.parameter])
    ]
    num_steps = _num_steps(common, folder)
    if num_steps is None or not any(name.startswith(PREFIX) for name in names):
        raise UserError(
            f"{folder}: holds no optimizer state; go on with a fresh optimizer by --no-load-optim, "
            "or begin a new run with its weights by --finetune"
        )
    shards += _fp32_weights(layout, names)
    with torch.no_grad():
        fill(_own(shards, layout.unpadded_sizes), folder, reader)
    for one in _single(optimizer):
        for group in one.optimizer.param_groups:
            group["step"] = num_steps


def load_master_weights(
    optimizer: Any, layout: Layout, folder: Path, reader: FileSystemReader | None
) -> None:
    """Fills fp32 weights at the full precision of a checkpoint, with no message to other ranks.

    The weights that a bf16 run begins with are rounded. Its master weights are those of the
    optimizer in the checkpoint, or where it holds none the checkpoint's weights, unrounded. An fp32
    run's weights are the master weights of a bf16 run's checkpoint.

    Args:
        optimizer: megatron-core's.
        layout: Where the model's parameters lie.
        folder: An ``iter_`` folder, whose weights the model has been given.
        reader: Reads it; None for what lies there as it is.

    Raises:
        UserError: The checkpoint is damaged.
    """
    reader = reader or SafeReader(folder)
    names = reader.read_metadata().state_dict_metadata
    masters = master_weights(optimizer)
    shards = [
        replace(shard, name=_stored_name(shard.name, names))
        for parameter, (begin, values) in masters.items()
        for shard in state_shards(
            LocalState(parameter, begin, {MASTER: values}, is_sharded=False),
            layout.parts[parameter],
        )
    ]
    shards += _fp32_weights(layout, names)
    with torch.no_grad():
        fill(_own(shards, layout.unpadded_sizes), folder, reader)


def _fp32_weights(layout: Layout, names: Mapping[str, Any]) -> list[TensorShard]:
    """fp32 parameters, whole on every rank, for which a checkpoint has master weights."""
    found = []
    for parameter, parts in layout.parts.items():
        if parameter.dtype != torch.float32:
            continue
        held = LocalState(parameter, 0, {MASTER: parameter.detach()}, is_sharded=False)
        for shard in state_shards(held, parts):
            name = _stored_name(shard.name, names)
            if name.startswith(PREFIX):
                found.append(replace(shard, name=name))
    return found


def _own(shards: list[TensorShard], unpadded_sizes: UnpaddedSizes) -> list[TensorShard]:
    """What a checkpoint holds of shards; padded heads become 0."""
    found = []
    for shard in shards:
        own = unpadded_shard(shard, unpadded_sizes)
        if own is not shard:
            shard.values.zero_()
        if own is not None:
            found.append(own)
    return found


def _stored_name(name: str, names: Mapping[str, Any]) -> str:
    """Where a shard's values lie: earlier versions and fp32 runs name master weights otherwise."""
    weight = name.removeprefix(f"{PREFIX}{MASTER}.")
    if weight == name or name in names:
        return name
    older = f"{PREFIX}param.{weight}"
    return older if older in names else weight


def _num_steps(common: Any, folder: Path) -> int | None:
    """Steps that the saved optimizer had taken; None where it does not say.

    Raises:
        UserError: It says something else than a number of steps.
    """
    try:
        found = next(_numbers_of_steps(common), None)
        num_steps = None if found is None else int(found)
        is_number = num_steps is None or num_steps >= 0
    except (RuntimeError, ValueError, OverflowError, NotImplementedError):
        is_number = False  # NaN, a tensor of several or no values, a structure without an end
    if not is_number:
        raise UserError(
            f"{folder / 'common.pt'}: the optimizer's step is no number; load another checkpoint"
        )
    return num_steps


def _numbers_of_steps(common: Any) -> Iterator[Any]:
    if isinstance(common, dict):
        for name in ("step", "common_step"):
            if isinstance(common.get(name), (int, float, torch.Tensor)):
                yield common[name]
        common = list(common.values())
    if isinstance(common, list):
        for entry in common:
            yield from _numbers_of_steps(entry)
