"""The typed boundary to megatron-core's distributed checkpoints.

In: sharded state dictionaries. Out: what each rank writes, and state read back from torch's
distributed format, which loads at any parallel layout. Loading executes nothing of a file: the
index goes through an allow-list, and everything else is read as weights only. For saving, only the
division into shards is megatron-core's: its own writers copy the state into helper processes, or
write it through the page cache.
"""

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
]

# What megatron-core's own loading asks of a checkpoint: that optimizer state lies by parameter.
_CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


class _SafePlanner(MCoreLoadPlanner):  # type: ignore[misc]
    """megatron-core's load plan, reading stored objects as weights only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Takes one object; torch's own would unpickle it as it is."""
        name = read_item.dest_index.fqn
        loaded = torch.load(value, weights_only=True)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded


class SafeLoad(TorchDistLoadShardedStrategy):  # type: ignore[misc]
    """megatron-core's loading with a reader and a planner that trust nothing."""

    def __init__(self, reader: FileSystemReader | None = None) -> None:
        """Reads by ``reader``, or what lies in the folder as it is."""
        super().__init__()
        self._reader = reader

    def load(
        self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path, *_: Any, **__: Any
    ) -> dict[str, Any]:
        """Reads this rank's part of what ``sharded_state_dict`` describes.

        Later versions of megatron-core hand over more: how it was saved, which does not matter.
        """
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
    """A part of a tensor as this process holds it.

    Attributes:
        name: The whole tensor's name in a checkpoint.
        layer: Which layer's it is, where the whole tensor has all layers; None otherwise.
        begin: Where the part begins in the layer's tensor.
        data: The part itself, not a copy.
        parameter: The parameter that the part is a view of.
    """

    name: str
    layer: int | None
    begin: tuple[int, ...]
    data: torch.Tensor
    parameter: torch.Tensor

    def of_copy(self, copy: torch.Tensor) -> torch.Tensor:
        """The same part of a contiguous copy of the parameter, of any dtype and device."""
        offset = int(self.data.storage_offset() - self.parameter.storage_offset())
        return copy.as_strided(self.data.size(), self.data.stride(), offset)


def local_shards(module: Any) -> list[LocalShard]:
    """Every tensor of a model chunk, as checkpoints name and cut it, without padded heads.

    The shards of a parameter follow each other.
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
    """The sharded tensors of an entry: SwiGLU's matrix is two of them."""
    if isinstance(entry, ShardedTensorFactory):
        return list(entry.build())
    return [entry] if isinstance(entry, ShardedTensor) else []


@dataclass(frozen=True)
class ParameterShard:
    """Consecutive values of a parameter, and the box of the whole model's tensor that they are.

    Attributes:
        name: The whole tensor's.
        global_shape: Its shape, axes of layers included.
        begin: The first of the values in the flattened parameter.
        shape: Of the box, without axes of layers.
        is_main: Whether this rank's data-parallel group is the one that saves it.
        may_differ: Whether the stored tensor may have another number of rows: the vocabulary's.
    """

    name: str
    global_shape: tuple[int, ...]
    begin: int
    shape: tuple[int, ...]
    is_main: bool
    may_differ: bool
    _global_offsets: tuple[int, ...]

    @property
    def num_values(self) -> int:
        """How many values."""
        return torch.Size(self.shape).numel()

    def offsets_of(self, offsets: tuple[int, ...]) -> tuple[int, ...]:
        """Where a box of this part begins in the whole tensor."""
        layers = self._global_offsets[: len(self._global_offsets) - len(offsets)]
        inner = self._global_offsets[len(layers) :]
        return (*layers, *(a + b for a, b in zip(inner, offsets, strict=True)))

    def sizes_of(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a box of this part in the whole tensor."""
        return (1,) * (len(self._global_offsets) - len(sizes)) + tuple(sizes)


def parameter_shards(state_dict: dict[str, Any]) -> dict[torch.Tensor, list[ParameterShard]]:
    """Where every parameter of a model lies in the whole model.

    Args:
        state_dict: A sharded state dictionary of its chunks; stays as it is.

    Returns:
        Parts in the order of their values, by parameter.
    """
    found: dict[torch.Tensor, list[ParameterShard]] = {}
    for entry in nested_values(state_dict):
        tensors = _tensors_of(entry)
        if tensors:
            found[entry.data] = [_part_of(entry.data, tensor) for tensor in tensors]
    return found


def _part_of(parameter: torch.Tensor, tensor: Any) -> ParameterShard:
    assert tensor.data.is_contiguous(), f"{tensor.key} is no range of its parameter"
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
    """Whether a rank of this data-parallel group, a replica's last coordinate, holds the main."""
    replica = tensor.replica_id
    return bool(is_main_replica((*replica[:-1], 0) if isinstance(replica, tuple) else replica))


def saved_shards(
    state_dict: dict[str, Any], common: dict[str, Any]
) -> tuple[list[TensorShard], list[StoredObject], bytes]:
    """What this rank's data-parallel group writes of a sharded state dictionary.

    Args:
        state_dict: Of the model's chunks.
        common: What is the same on every rank.

    Returns:
        Pieces of tensors, which every rank of the group has; objects, of which this rank holds the
        main replica; and the rest, as ``common.pt`` holds it.
    """
    sharded, rest = save_preprocess(
        {**state_dict, **common, "content_metadata": dict(_CONTENT)},
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
            objects.append(StoredObject(key, _saved([entry.data for entry in found])))
    return shards, objects, _saved(rest)


def _shard_of(tensor: Any) -> TensorShard:
    """A megatron-core sharded tensor as a shard; its leading layer axes have length 1."""
    sizes = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
    return TensorShard(
        tensor.key, tuple(tensor.global_shape), tuple(tensor.global_offset), sizes, tensor.data
    )


def _saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def format_file() -> bytes:
    """``metadata.json``, by which megatron-core knows the format."""
    return json.dumps(asdict(CheckpointingConfig("torch_dist", 1))).encode()


def load_sharded(
    sharded_state_dict: dict[str, Any], folder: Path, reader: FileSystemReader | None = None
) -> dict[str, Any]:
    """Reads what ``sharded_state_dict`` describes; every rank calls it.

    Args:
        sharded_state_dict: What to fill.
        folder: An ``iter_`` folder.
        reader: Gives its tensors, where they are not to be taken as they lie there.
    """
    loaded: dict[str, Any] = dist_checkpointing.load(
        sharded_state_dict, str(folder), sharded_strategy=SafeLoad(reader)
    )
    return loaded
