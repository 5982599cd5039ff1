"""The typed boundary to megatron-core's distributed checkpoints.

In: sharded state dictionaries. Out: files in torch's distributed format, which load at any parallel
layout. Saving runs in this process: megatron-core's own writer starts helper processes at every
save, which costs seconds where a checkpoint takes a fraction of one.
"""

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

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
    loaded: dict[str, Any] = dist_checkpointing.load(sharded_state_dict, str(folder))
    return loaded
