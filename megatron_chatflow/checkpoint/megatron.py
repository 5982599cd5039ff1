"""The typed boundary to megatron-core's distributed checkpoints.

In: sharded state dictionaries. Out: files in torch's distributed format, which load at any parallel
layout. Loading executes nothing of a file: the index goes through an allow-list, and everything
else is read as weights only. Saving runs in this process: megatron-core's own writer starts helper
processes at every save, which costs seconds where a checkpoint takes a fraction of one.
"""

import io
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_chatflow.checkpoint.safe_index import read_index

__all__ = ["OPTIMIZER_LAYOUT", "CheckpointException", "load_sharded", "save_sharded"]

# How the distributed optimizer lays out its state: by parameter, so that it loads at any layout.
OPTIMIZER_LAYOUT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


class InProcessSave(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Writes megatron-core's sharded tensors through torch's own file writer, flushed to disk."""

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        """Writes this rank's shards; returns when every rank's are on the disk."""
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        writer = FileSystemWriter(
            checkpoint_dir, single_file_per_rank=True, sync_files=True, thread_count=1
        )
        save(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=writer,
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
            ),
        )


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
        load(state, storage_reader=_SafeReader(checkpoint_dir), planner=planner)
        loaded: dict[str, Any] = _replace_sharded_keys_with_state_dict_keys(
            {key: _unwrap_pyt_sharded_tensor(value) for key, value in state.items()},
            flat_mapping,
            rename_mapping,
        )
        _restore_dict_types(loaded, sharded_state_dict)
        return loaded


def save_sharded(sharded_state_dict: dict[str, Any], folder: Path) -> None:
    """Writes a sharded state dictionary; every rank calls it with the same folder."""
    dist_checkpointing.save(
        sharded_state_dict,
        str(folder),
        sharded_strategy=InProcessSave("torch_dist", 1),
        content_metadata=OPTIMIZER_LAYOUT,
    )


def load_sharded(sharded_state_dict: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Reads what ``sharded_state_dict`` describes; every rank calls it."""
    loaded: dict[str, Any] = dist_checkpointing.load(
        sharded_state_dict, str(folder), sharded_strategy=SafeLoad()
    )
    return loaded
