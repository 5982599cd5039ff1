"""Copies what a run reads from URLs to the local disk before the run starts.

Everything after this reads local files. Every process calls `fetch_inputs` before the job's
processes meet. The first of each node fills the node's cache, and rank 0 the run's folder, which
all nodes share. Nothing reads either before the processes have met.
"""

import logging
from pathlib import Path

from megatron_chatflow import remote
from megatron_chatflow.checkpoint.files import LATEST, latest_iteration
from megatron_chatflow.checkpoint.remote import (
    adopt_run,
    check_new_run,
    claim_run,
    fetch_newer_checkpoint,
    fetch_run,
)
from megatron_chatflow.config import RunConfig
from megatron_chatflow.config.load import SMALL_HUGGINGFACE_FILES
from megatron_chatflow.data.remote_dataset import fetch_datasets
from megatron_chatflow.remote import CachedPath

logger = logging.getLogger(__name__)


def fetch_inputs(
    config: RunConfig, *, rank: int = 0, local_rank: int = 0, is_dry_run: bool = False
) -> None:
    """Copies the datasets and checkpoints of a configuration that are named by URLs.

    A dry run copies the same, but nothing into the run's folder.

    Args:
        config: The configuration.
        rank: Rank of this process in the job.
        local_rank: Its rank on its node.
        is_dry_run: Whether to write nothing but the cache.

    Raises:
        UserError: Something is missing or damaged, or the disk is full.
        RemoteError: A store cannot be reached.
    """
    checkpoint = config.checkpoint
    if local_rank == 0:
        fetch_sources(config)
        for path in (checkpoint.load, checkpoint.pretrained_checkpoint):
            if isinstance(path, CachedPath):
                fetch_run(path.url, path)
        if isinstance(checkpoint.load_hf, CachedPath):
            suffixes = (*SMALL_HUGGINGFACE_FILES, ".safetensors")
            remote.download_folder(checkpoint.load_hf, suffixes, "config.json")
    if checkpoint.save_remote is None or checkpoint.save is None or rank != 0:
        return
    root, url = Path(checkpoint.save), checkpoint.save_remote
    load = checkpoint.load
    if load is not None and not checkpoint.finetune and Path(load) == root:
        if is_dry_run:
            _describe(root, url)
        else:
            fetch_newer_checkpoint(root, url)
    elif checkpoint.finetune or not isinstance(load, CachedPath) or load.url != url:
        check_new_run(root, url)
    elif not is_dry_run:
        adopt_run(root, url)
    if not is_dry_run:
        claim_run(root)


def fetch_sources(config: RunConfig) -> None:
    """Copies the datasets of a configuration that are named by URLs.

    Raises:
        UserError, RemoteError: As `fetch_inputs`.
    """
    sources = config.data.sources.values()
    paths = [path for one in sources for path in (*one.paths, *one.validation_paths)]
    fetch_datasets([path.url for path in paths if isinstance(path, CachedPath)])


def _describe(root: Path, url: str) -> None:
    content = remote.read_bytes(f"{url}/{LATEST}")
    local = latest_iteration(root) or 0
    if content is not None and content.strip().isdigit() and int(content) > local:
        logger.warning(
            "checkpoint.save_remote: the run will first copy iteration %d from %s to %s",
            int(content),
            url,
            root,
        )
