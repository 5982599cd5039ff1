"""megatron-core's datasets as the loader's benchmark sees them.

In: the prefix of a dataset. Out: `GPTDataset` samples, and batches of a `BlendedDataset`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from torch.utils.data import default_collate

from megatron_chatflow.evaluation.benchmark_loader_corpus import VOCAB_SIZE


class _Tokenizer:
    """What `GPTDataset` asks of a tokenizer."""

    vocab_size = VOCAB_SIZE
    eod = 0
    pad = -1
    unique_identifiers = {"class": "benchmark"}


class PeerDataset:
    """One epoch of a `GPTDataset` without a dense mask, or with one that isolates documents.

    Attributes:
        num_samples: In the epoch.
        num_index_bytes: Of the index that it built.
    """

    def __init__(self, prefix: Path, seq_length: int, *, isolate: bool = False) -> None:
        """Builds the index, in memory."""
        indexed = IndexedDataset(str(prefix), multimodal=False, mmap=True)
        self.config = GPTDatasetConfig(
            random_seed=1,
            sequence_length=seq_length,
            split="1",
            tokenizer=_Tokenizer(),
            reset_position_ids=isolate,
            reset_attention_mask=isolate,
            eod_mask_loss=False,
            create_attention_mask=isolate,
        )
        documents = np.arange(len(indexed.document_indices) - 1, dtype=np.int32)
        self.dataset: Any = GPTDataset(
            indexed, str(prefix), documents, None, Split.train, self.config
        )
        self.num_samples = len(self.dataset)
        self.num_index_bytes = sum(
            int(index.nbytes)
            for index in (
                self.dataset.document_index,
                self.dataset.sample_index,
                self.dataset.shuffle_index,
            )
        )

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        """One sample."""
        sample: dict[str, torch.Tensor] = self.dataset[index]
        return sample


class PeerBatches:
    """Batches of a `BlendedDataset` over one corpus, taken as two sources.

    Attributes:
        num_index_bytes: Of the indices of the blend and of its datasets.
    """

    def __init__(
        self, prefix: Path, seq_length: int, weights: Sequence[float], num_samples: int
    ) -> None:
        """Builds the indices."""
        parts = [PeerDataset(prefix, seq_length) for _ in weights]
        datasets = [part.dataset for part in parts]
        self._blended: Any = BlendedDataset(datasets, list(weights), num_samples, parts[0].config)
        self.num_index_bytes = sum(part.num_index_bytes for part in parts) + int(
            self._blended.dataset_index.nbytes + self._blended.dataset_sample_index.nbytes
        )

    def batch(self, begin: int, end: int, micro_batch_size: int) -> list[Any]:
        """Micro-batches of the samples [begin, end)."""
        return [
            default_collate([self._blended[k] for k in range(first, first + micro_batch_size)])
            for first in range(begin, end, micro_batch_size)
        ]
