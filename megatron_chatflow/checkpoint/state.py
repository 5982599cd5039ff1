"""Splits the state of megatron-core's optimizers into shards, and loads it back.

The plain, the mixed-precision and the distributed optimizer give the same tensor names,
``optimizer.state.<name>.<weight>``, and the same values, so that each loads what another one saved,
at any parallel layout. No state is gathered: each rank names the shards that it holds, and a load
fills them in place. In fp32 runs the weights are their own master weights, so that only the moments
are stored.

The precision-aware optimizer is a distributed one whose state transformer-engine's Adam holds in
other dtypes. Its master weights are saved in fp32 like any others, and its moments in bf16 or fp32;
a load converts them to the dtypes of the run. So a run may switch it on or off. The optimizer that
offloads its state holds it in fp32, in the memory of the host or the GPU, and is loaded in place.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_chatflow.checkpoint.layout import (
    SplitFp32,
    TensorShard,
    UnpaddedSizes,
    boxes_of_range,
    unpadded_shard,
)
from megatron_chatflow.checkpoint.megatron import ParameterShard
from megatron_chatflow.checkpoint.reader import SafeReader, fill
from megatron_chatflow.errors import UserError

MASTER = "fp32_param"
AVERAGE = "ema"  # of `megatron_chatflow.training.weight_average`
PREFIX = "optimizer.state."


@dataclass(frozen=True)
class LocalState:
    """The state that this rank's optimizer holds for a parameter."""

    parameter: torch.Tensor  # the model's parameter
    begin: int  # the first value of the flattened parameter that the state belongs to
    tensors: dict[str, torch.Tensor]  # the state's tensors by name, all of the same size
    # Whether the other data-parallel ranks hold the other values; if not, all hold the same ones.
    is_sharded: bool
    remainders: torch.Tensor | None = None  # int16, of the master weights if those are bf16


@dataclass(frozen=True)
class LoadedState:
    """Where a load puts the state of a parameter."""

    state: LocalState  # the tensors to fill
    store: Callable[[], None]  # hands them to the optimizer, once they are filled


def local_states(optimizer: Any) -> list[LocalState]:
    """Returns all state that this rank's optimizer holds; missing moments are created as 0.

    The optimizer is megatron-core's plain, mixed-precision or distributed one, or a chain.
    """
    return [state for one in single(optimizer) for state in _states_of_one(one)]


def single(optimizer: Any) -> list[Any]:
    """Returns the optimizers that a chain consists of."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _offloads(optimizer: Any) -> bool:
    return isinstance(optimizer.optimizer, HybridDeviceOptimizer)


def _is_precision_aware(optimizer: Any) -> bool:
    return bool(optimizer.config.use_precision_aware_optimizer) and not _offloads(optimizer)


def _states_of_one(optimizer: Any) -> Iterator[LocalState]:
    inner = optimizer.optimizer
    if _offloads(optimizer):
        _initialize_offloaded(inner)
        for parameter, main, begin, is_sharded in main_parameters(optimizer):
            own = inner.param_to_inner_param[main]
            state = next(one.state for one in inner.sub_optimizers if own in one.state)[own]
            tensors = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
            tensors[MASTER] = own.detach()
            yield LocalState(parameter, begin, tensors, is_sharded)
        return
    if _is_precision_aware(optimizer):
        for parameter, main, begin, is_sharded in main_parameters(optimizer):
            _initialize(inner, main)
            tensors = {name: _stored_values(inner, main, name) for name in inner.state[main]}
            master = tensors.pop("master_param", main.detach())
            has_remainders = master.dtype == torch.int16
            tensors[MASTER] = main.detach() if has_remainders else master
            remainders = master if has_remainders else None
            yield LocalState(parameter, begin, tensors, is_sharded, remainders)
        return
    optimizer.init_state_fn(inner, optimizer.config)
    for parameter, main, begin, is_sharded in main_parameters(optimizer):
        tensors = {
            name: value
            for name, value in inner.state[main].items()
            if isinstance(value, torch.Tensor) and value.shape == main.shape and name != "step"
        }
        if parameter.dtype != torch.float32:
            tensors[MASTER] = main.detach()
        yield LocalState(parameter, begin, tensors, is_sharded)


def _initialize_offloaded(hybrid: Any) -> None:
    """Creates the state of the optimizers that a hybrid one consists of, where there is none."""
    for one in hybrid.sub_optimizers:
        for group in one.param_groups:
            for own in group["params"]:
                if one.state[own]:
                    continue
                for name in ("exp_avg", "exp_avg_sq"):
                    one.state[own][name] = torch.zeros_like(own)
                if isinstance(one, torch.optim.AdamW):
                    one.state[own]["step"] = torch.zeros((), dtype=torch.float32, device=own.device)


def _initialize(adam: Any, main: Any) -> None:
    """Creates the state of a parameter that has none; moments are 0."""
    if not adam.state[main]:
        adam.initialize_state(main, adam.store_param_remainders and main.dtype == torch.bfloat16)


def initialize_state(optimizer: Any, main: torch.Tensor) -> None:
    """Creates the moments of one of the inner optimizer's parameters, as 0, if it has none.

    ``optimizer`` is one of `single`.
    """
    inner = optimizer.optimizer
    if _is_precision_aware(optimizer):
        _initialize(inner, main)
    elif not inner.state[main]:
        inner.state[main] |= {name: torch.zeros_like(main) for name in ("exp_avg", "exp_avg_sq")}


def _stored_values(adam: Any, main: Any, name: str) -> torch.Tensor:
    """Returns state as it is saved: fp32, bf16, or the remainders of master weights.

    Only fp16 state, which has a scale, is copied.
    """
    values: torch.Tensor = adam.state[main][name]
    if values.dtype is torch.float16:
        values = adam.get_unscaled_state(main, name)
    return values


def _store(adam: Any, main: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Converts fp32 state to the dtypes of transformer-engine's Adam, and hands it over."""
    _initialize(adam, main)
    for name, values in tensors.items():
        if name == MASTER and not adam.master_weights:
            main.copy_(values)
        elif name == MASTER and adam.state[main]["master_param"].dtype == torch.int16:
            SplitFp32(main.detach(), adam.state[main]["master_param"]).set(values)
        else:
            # The scale of fp16 state is computed anew, and is the same one in the same layout. The
            # values are scaled in place.
            scaled = "master_param" if name == MASTER else name
            adam.set_scaled_state(main, scaled, values.clone())


def main_parameters(optimizer: Any) -> Iterator[tuple[Any, Any, int, bool]]:
    """Yields model parameter, master parameter, the latter's begin, and whether it is sharded.

    ``optimizer`` is one of `single`. Where transformer-engine's Adam holds the master weights, the
    second is the shard of the weights by which it holds them.
    """
    if hasattr(optimizer, "gbuf_ranges"):
        half = optimizer.shard_fp32_from_float16_groups
        if optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
            half = optimizer.shard_float16_groups
        for model_groups, main_groups in (
            (optimizer.model_float16_groups, half),
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


def master_weights(optimizer: Any) -> dict[torch.Tensor, LoadedState]:
    """Returns where to put this rank's fp32 master weights, by parameter that is not fp32.

    The model's weights must be loaded before a state is stored.
    """
    found: dict[torch.Tensor, LoadedState] = {}
    for one in single(optimizer):
        for parameter, main, begin, _ in main_parameters(one):
            if parameter.dtype == torch.float32:
                continue
            own = one.optimizer.param_to_inner_param[main] if _offloads(one) else main
            is_ready = own.dtype == torch.float32
            values = own.detach() if is_ready else torch.zeros_like(main, dtype=torch.float32)
            state = LocalState(parameter, begin, {MASTER: values}, is_sharded=False)
            store = _nothing if is_ready else partial(_store, one.optimizer, main, state.tensors)
            found[parameter] = LoadedState(state, store)
    return found


def _nothing() -> None:
    """Stores state that was filled in place."""


def _loaded_states(optimizer: Any) -> Iterator[LoadedState]:
    for one in single(optimizer):
        if not _is_precision_aware(one):
            yield from (LoadedState(state, _nothing) for state in _states_of_one(one))
            continue
        for parameter, main, begin, is_sharded in main_parameters(one):
            tensors = {
                name: torch.zeros_like(main, dtype=torch.float32)
                for name in ("exp_avg", "exp_avg_sq", MASTER)
            }
            state = LocalState(parameter, begin, tensors, is_sharded)
            yield LoadedState(state, partial(_store, one.optimizer, main, tensors))


def state_shards(state: LocalState, parts: list[ParameterShard]) -> list[TensorShard]:
    """Returns a parameter's state as shards of the whole model's tensors, without copying.

    ``parts`` are the parameter's shards, in the order of its values.
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
                    state.remainders[at : at + length]
                    if what == MASTER and state.remainders is not None
                    else None,
                )
                for what, values in state.tensors.items()
            ]
            at += length
    return shards


def weight_shards(state: LocalState, parts: list[ParameterShard]) -> list[TensorShard]:
    """Returns the weights of an FP8 parameter, its master weights rounded to bf16, as shards."""
    rounded = {MASTER: state.tensors[MASTER].to(state.parameter.dtype)}
    shards = state_shards(replace(state, tensors=rounded, remainders=None), parts)
    return [replace(shard, name=shard.name.removeprefix(f"{PREFIX}{MASTER}.")) for shard in shards]


def common_state(optimizer: Any) -> dict[str, Any]:
    """Returns rank-independent state in the form of megatron-core's mixed-precision optimizer."""
    groups = [
        {name: value for name, value in group.items() if name != "params"}
        for one in single(optimizer)
        for group in one.optimizer.param_groups
    ]
    for one in single(optimizer):
        if _offloads(one):
            # Its groups contain classes, and no number of steps.
            groups = [
                {name: value for name, value in group.items() if not isinstance(value, type)}
                | {"step": _num_steps_of_offloaded(one.optimizer)}
                for group in groups
            ]
    return {"optimizer": {"param_groups": groups, "state": {}}}


def _num_steps_of_offloaded(hybrid: Any) -> int:
    for one in hybrid.sub_optimizers:
        for group in one.param_groups:
            steps = [one.state[own].get("step") for own in group["params"]]
            return int(next((step for step in steps if step is not None), group.get("step", 0)))
    return 0


def _set_num_steps(optimizer: Any, num_steps: int) -> None:
    # Of a hybrid optimizer only those that it consists of: it would give its own number to them
    # before every step, and does not count.
    for one in (
        optimizer.optimizer.sub_optimizers if _offloads(optimizer) else [optimizer.optimizer]
    ):
        for group in one.param_groups:
            if isinstance(one, torch.optim.AdamW):
                for own in group["params"]:
                    one.state[own]["step"].fill_(num_steps)
            else:
                group["step"] = num_steps


@dataclass(frozen=True)
class Layout:
    """The positions of this rank's parameters in a checkpoint."""

    parts: Mapping[torch.Tensor, list[ParameterShard]]  # shards by parameter
    # sizes of matrices with padded heads, which a checkpoint leaves out
    unpadded_sizes: UnpaddedSizes


def load(
    optimizer: Any,
    layout: Layout,
    common: Any,
    folder: Path,
    reader: FileSystemReader | None,
    average: Sequence[LocalState] = (),
) -> bool:
    """Loads this rank's optimizer state in place, without communication.

    Everything else in the optimizer's groups follows from the run's configuration. ``common`` is
    the rank-independent state that was saved, of any optimizer and version. ``average`` is filled
    if the checkpoint holds an average of the weights; the result is whether it does.

    Raises:
        UserError: The checkpoint holds no optimizer state, or is damaged.
    """
    reader = reader or SafeReader(folder)
    names = reader.read_metadata().state_dict_metadata
    num_steps = _num_steps(common, folder)
    if num_steps is None or not any(name.startswith(PREFIX) for name in names):
        raise UserError(
            f"{folder}: contains no optimizer state; continue with a fresh optimizer "
            "(--no-load-optim), or start a new run from the weights (--finetune)"
        )
    has_average = any(name.startswith(f"{PREFIX}{AVERAGE}.") for name in names)
    states = list(_loaded_states(optimizer))
    if has_average:
        states += [LoadedState(state, _nothing) for state in average]
    _fill(states, layout, names, folder, reader)
    for one in single(optimizer):
        _set_num_steps(one, num_steps)
    return has_average


def load_master_weights(
    optimizer: Any, layout: Layout, folder: Path, reader: FileSystemReader | None
) -> None:
    """Loads fp32 weights at a checkpoint's full precision, without communication.

    The master weights of a bf16 run become the master weights in the checkpoint or, if it holds
    none, its weights. The weights of an fp32 run become the master weights of a bf16 run's
    checkpoint. The model's weights must have been loaded before.
    """
    reader = reader or SafeReader(folder)
    names = reader.read_metadata().state_dict_metadata
    _fill(list(master_weights(optimizer).values()), layout, names, folder, reader)


def _fill(
    states: Sequence[LoadedState],
    layout: Layout,
    names: Mapping[str, Any],
    folder: Path,
    reader: FileSystemReader,
) -> None:
    """Reads states, and fp32 parameters for which a checkpoint holds master weights, in place.

    Padded heads are set to 0.
    """
    shards = [
        replace(shard, name=_stored_name(shard.name, names))
        for loaded in states
        for shard in state_shards(loaded.state, layout.parts[loaded.state.parameter])
    ]
    for parameter, parts in layout.parts.items():
        if parameter.dtype == torch.float32:
            state = LocalState(parameter, 0, {MASTER: parameter.detach()}, is_sharded=False)
            for shard in state_shards(state, parts):
                name = _stored_name(shard.name, names)
                if name.startswith(PREFIX):
                    shards.append(replace(shard, name=name))
    wanted = []
    with torch.no_grad():
        for shard in shards:
            unpadded = unpadded_shard(shard, layout.unpadded_sizes)
            if unpadded is not shard:
                shard.values.zero_()
            if unpadded is not None:
                wanted.append(unpadded)
        fill(wanted, folder, reader)
        for loaded in states:
            loaded.store()


def _stored_name(name: str, names: Mapping[str, Any]) -> str:
    """Returns a tensor's name in the checkpoint; earlier versions and fp32 runs use other names."""
    weight = name.removeprefix(f"{PREFIX}{MASTER}.")
    if weight == name or name in names:
        return name
    older = f"{PREFIX}param.{weight}"
    return older if older in names else weight


def _num_steps(common: Any, folder: Path) -> int | None:
    """Returns the number of steps of the saved optimizer; None if it is not recorded."""
    try:
        found = next(_numbers_of_steps(common), None)
        num_steps = None if found is None else int(found)
        is_number = num_steps is None or num_steps >= 0
    except (RuntimeError, ValueError, OverflowError, NotImplementedError):
        is_number = False  # NaN, a tensor without exactly one value, a recursive structure
    if not is_number:
        raise UserError(
            f"{folder / 'common.pt'}: the optimizer step is not a number; load another checkpoint"
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
