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
from megatron.core.dist_checkpointing.mapping import apply_factories
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
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_chatflow.checkpoint.own_heads import OwnSizes, own_part, own_piece
from megatron_chatflow.checkpoint.safe_index import read_index
from megatron_chatflow.checkpoint.shard_plan import StoredObject, TensorPiece

__all__ = [
    "OPTIMIZER_LAYOUT",
    "CheckpointException",
    "format_file",
    "load_sharded",
    "piece_of",
    "sharded_parts",
]

# How the distributed optimizer lays out its state: by parameter, so that it loads at any layout.
OPTIMIZER_LAYOUT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


class _SafeReader(FileSystemReader):
    """torch's reader with an index that is not trusted."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Reads the index through the allow-list."""
        return read_index(Path(self.path))


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
        load(state, storage_reader=self._reader or _SafeReader(checkpoint_dir), planner=planner)
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
    """

    name: str
    layer: int | None
    begin: tuple[int, ...]
    data: torch.Tensor


def local_shards(module: Any) -> list[LocalShard]:
    """Every tensor of a model chunk, as checkpoints name and cut it, without padded heads."""
    sharded = module.sharded_state_dict()
    apply_factories(sharded)
    shards = []
    for tensor in nested_values(sharded):
        if not isinstance(tensor, ShardedTensor):
            continue
        layer = tensor.global_offset[0] if tensor.prepend_axis_num else None
        begin = tuple(tensor.global_offset[tensor.prepend_axis_num :])
        own = own_part(tensor.key, begin, tensor.data, module.own_sizes)
        if own is not None:
            shards.append(LocalShard(tensor.key, layer, begin, own))
    return shards


def sharded_parts(
    state_dict: dict[str, Any], own_sizes: OwnSizes
) -> tuple[list[TensorPiece], list[StoredObject], bytes]:
    """What this rank writes of a sharded state dictionary, and what all ranks have in common.

    Args:
        state_dict: What `store.sharded_state` gives for saving.
        own_sizes: Of matrices with padded heads, which are not written.

    Returns:
        Pieces of tensors and objects of which this rank holds the main replica; and the rest, as
        ``common.pt`` holds it.
    """
    sharded, common = save_preprocess(
        {**state_dict, "content_metadata": OPTIMIZER_LAYOUT}, validate_access_integrity=False
    )
    pieces: list[TensorPiece] = []
    objects: list[StoredObject] = []
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
    for key, found in by_key.items():
        if isinstance(found[0], ShardedTensor):
            own = [own_piece(piece_of(tensor), own_sizes) for tensor in found]
            pieces += [piece for piece in own if piece is not None]
        else:
            objects.append(StoredObject(key, _saved([entry.data for entry in found])))
    return pieces, objects, _saved(common)


def piece_of(tensor: Any) -> TensorPiece:
    """A megatron-core sharded tensor as a piece; its leading layer axes have length 1."""
    assert tensor.flattened_range is None, "flattened tensors are no boxes"
    sizes = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
    return TensorPiece(
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
