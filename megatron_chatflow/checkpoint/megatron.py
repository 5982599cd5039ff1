"""The typed boundary to megatron-core's distributed checkpoints.

It turns megatron-core's sharded state dictionaries into the shards that a rank writes, and loads
them from torch's distributed format at any parallel layout. Loading executes nothing from a file:
the index is checked and everything else is loaded as weights only. For saving, only megatron-core's
division into shards is used: its writers copy the state into child processes, or write it through
the page cache.
"""

import copy
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from megatron.core.fp8_utils import is_float8tensor
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_chatflow.checkpoint.layout import StoredObject, TensorShard, unpadded_values
from megatron_chatflow.checkpoint.reader import SafeReader

__all__ = [
    "CheckpointException",
    "ParameterShard",
    "format_file",
    "load_sharded",
    "parameter_shards",
    "saved_shards",
    "without_objects",
]

# megatron-core's loading requires this: optimizer state is stored by parameter.
_CONTENT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


class _SafePlanner(MCoreLoadPlanner):  # type: ignore[misc]
    """megatron-core's load planner, which loads stored objects as weights only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Loads one object; torch's planner would unpickle anything."""
        name = read_item.dest_index.fqn
        loaded = torch.load(value, weights_only=True)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded


class SafeLoad(TorchDistLoadShardedStrategy):  # type: ignore[misc]
    """megatron-core's load strategy with a safe reader and planner."""

    def __init__(self, reader: FileSystemReader | None = None) -> None:
        """Uses ``reader``; None reads the folder's files unchanged."""
        super().__init__()
        # A quantized tensor's parts share its scale. megatron-core 0.19 would quantize each alone.
        self.stream_ckpt_dequant = False
        self._reader = reader

    def load(
        self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path, *_: Any, **__: Any
    ) -> dict[str, Any]:
        """Loads this rank's shards; later versions of megatron-core pass more arguments."""
        tensors = [t for t in nested_values(sharded_state_dict) if isinstance(t, ShardedTensor)]
        planner = _SafePlanner(
            shapes_validation_sharded_tensors=[t for t in tensors if not t.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={
                t.key: t for t in tensors if t.allow_shape_mismatch
            },
        )
        by_key, flat_mapping, rename_mapping = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict
        )
        state = mcore_to_pyt_state_dict(by_key, True)
        load(state, storage_reader=self._reader or SafeReader(checkpoint_dir), planner=planner)
        loaded: dict[str, Any] = _replace_sharded_keys_with_state_dict_keys(
            {key: _unwrap_pyt_sharded_tensor(value) for key, value in state.items()},
            flat_mapping,
            rename_mapping,
        )
        _restore_dict_types(loaded, sharded_state_dict)
        return loaded


@dataclass(frozen=True)
class LocalShard:
    """A shard of a tensor as this process holds it."""

    name: str  # the whole tensor's name in a checkpoint
    # the layer's number if the whole tensor has an axis of layers; None otherwise
    layer: int | None
    begin: tuple[int, ...]  # where the shard begins in the layer's tensor
    data: torch.Tensor  # the shard, not a copy
    parameter: torch.Tensor  # the parameter that the shard is a view of

    def of_copy(self, copy: torch.Tensor) -> torch.Tensor:
        """Returns the same shard of a contiguous copy of the parameter, of any dtype and device."""
        offset = int(self.data.storage_offset() - self.parameter.storage_offset())
        return copy.as_strided(self.data.size(), self.data.stride(), offset)


def local_shards(module: Any) -> list[LocalShard]:
    """Returns the shards of a model chunk with their names in checkpoints, without padded heads.

    The shards of a parameter are adjacent in the list.
    """
    shards = []
    for entry in nested_values(module.sharded_state_dict()):
        for tensor in _tensors_of(entry):
            layer = tensor.global_offset[0] if tensor.prepend_axis_num else None
            begin = tuple(tensor.global_offset[tensor.prepend_axis_num :])
            own = unpadded_values(tensor.key, begin, tensor.data, module.unpadded_sizes)
            if own is not None:
                shards.append(LocalShard(tensor.key, layer, begin, own, entry.data))
    return shards


def _tensors_of(entry: Any) -> list[Any]:
    """Returns the sharded tensors of an entry; there are two for the first matrix of SwiGLU.

    Those of an FP8 parameter have no values, because nothing can be a view of it.
    """
    if _is_fp8(entry):
        entry = copy.copy(entry)
        entry.data = torch.empty(entry.data.shape, dtype=entry.data.dtype, device="meta")
    if isinstance(entry, ShardedTensorFactory):
        return list(entry.build())
    return [entry] if isinstance(entry, ShardedTensor) else []


@dataclass(frozen=True)
class ParameterShard:
    """Consecutive values of a parameter and their box in the whole model's tensor."""

    name: str  # the whole tensor's name
    global_shape: tuple[int, ...]  # the whole tensor's shape, including axes of layers
    begin: int  # index of the first value in the flattened parameter
    shape: tuple[int, ...]  # the box's shape, without axes of layers
    is_main: bool  # whether this rank's data-parallel group saves it
    # whether the stored tensor may have another number of rows, as for vocabularies
    may_differ: bool
    _global_offsets: tuple[int, ...]

    @property
    def layer(self) -> int | None:
        """The layer's number if the whole tensor has an axis of layers; None otherwise."""
        has_axis = len(self._global_offsets) > len(self.shape)
        return self._global_offsets[0] if has_axis else None

    @property
    def num_values(self) -> int:
        """The number of values."""
        return torch.Size(self.shape).numel()

    def offsets_of(self, offsets: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the offsets in the whole tensor of a box of this shard."""
        layers = self._global_offsets[: len(self._global_offsets) - len(offsets)]
        inner = self._global_offsets[len(layers) :]
        return (*layers, *(a + b for a, b in zip(inner, offsets, strict=True)))

    def sizes_of(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape in the whole tensor of a box of this shard."""
        return (1,) * (len(self._global_offsets) - len(sizes)) + tuple(sizes)


def parameter_shards(state_dict: dict[str, Any]) -> dict[torch.Tensor, list[ParameterShard]]:
    """Returns the shards of each parameter, in the order of its values, in the whole model."""
    found: dict[torch.Tensor, list[ParameterShard]] = {}
    for entry in nested_values(state_dict):
        tensors = _tensors_of(entry)
        if tensors:
            found[entry.data] = [_part_of(entry.data, tensor) for tensor in tensors]
    return found


def _part_of(parameter: torch.Tensor, tensor: Any) -> ParameterShard:
    # An FP8 parameter has no storage of its own, and an offset of 0.
    assert tensor.data.is_contiguous(), f"{tensor.key} is not a contiguous range of its parameter"
    return ParameterShard(
        name=tensor.key,
        global_shape=tuple(tensor.global_shape),
        begin=tensor.data.storage_offset() - parameter.storage_offset(),
        shape=tuple(tensor.local_shape),
        is_main=_group_is_main(tensor),
        may_differ=tensor.allow_shape_mismatch,
        _global_offsets=tuple(tensor.global_offset),
    )


def _group_is_main(tensor: Any) -> bool:
    """Returns whether a rank of this data-parallel group holds the main replica."""
    replica = tensor.replica_id
    return bool(is_main_replica((*replica[:-1], 0) if isinstance(replica, tuple) else replica))


def saved_shards(
    state_dict: dict[str, Any], common: dict[str, Any]
) -> tuple[list[TensorShard], list[StoredObject], bytes]:
    """Returns what this rank's data-parallel group writes of the state dictionary of the chunks.

    ``common`` is state that is the same on every rank. FP8 parameters are left out, because their
    weights are saved as their master weights, rounded.

    Returns:
        Shards of tensors that every rank of the group holds; objects of which this rank holds the
        main replica; and the content of ``common.pt``.
    """
    kept = {
        name: {key: entry for key, entry in part.items() if not _is_fp8(entry)}
        for name, part in state_dict.items()
    }
    sharded, rest = save_preprocess(
        {**kept, **common, "content_metadata": dict(_CONTENT)},
        validate_access_integrity=False,
    )
    shards: list[TensorShard] = []
    objects: list[StoredObject] = []
    for entry in nested_values(sharded):
        if isinstance(entry, ShardedTensor) and _group_is_main(entry):
            shards.append(_shard_of(entry))
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
    for key, found in by_key.items():
        if not isinstance(found[0], ShardedTensor):
            # megatron-core expects an `_extra_state` for each linear layer. Its content is the
            # scaling of transformer-engine's FP8, which is computed anew after a load.
            objects.append(StoredObject(key, _saved([None] * len(found))))
    return shards, objects, _saved(rest)


def _is_fp8(entry: Any) -> bool:
    return bool(is_float8tensor(getattr(entry, "data", None)))


def _shard_of(tensor: Any) -> TensorShard:
    """Converts a megatron-core sharded tensor; its leading layer axes have length 1."""
    sizes = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
    return TensorShard(
        tensor.key, tuple(tensor.global_shape), tuple(tensor.global_offset), sizes, tensor.data
    )


def _saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def without_objects(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Returns a module's sharded state dictionary without the ``_extra_state`` of its layers.

    A load neither needs nor reads it: transformer-engine would unpickle it.
    """
    return {
        name: entry for name, entry in state_dict.items() if not isinstance(entry, ShardedObject)
    }


def format_file() -> bytes:
    """Returns the content of ``metadata.json``, which names the format to megatron-core."""
    return json.dumps(asdict(CheckpointingConfig("torch_dist", 1))).encode()


def load_sharded(
    sharded_state_dict: dict[str, Any], folder: Path, reader: FileSystemReader | None = None
) -> dict[str, Any]:
    """Loads a sharded state dictionary; a collective."""
    loaded: dict[str, Any] = dist_checkpointing.load(
        sharded_state_dict, str(folder), sharded_strategy=SafeLoad(reader)
    )
    return loaded
