"""Reads a checkpoint as if it had been saved with a larger vocabulary.

Stored tensors with one row for each vocabulary entry get rows for the new entries; all other
tensors are read unchanged. Each grown tensor is made from the whole stored tensor, so that it is
the same at every parallel layout.

Rows of weights and of the optimizer's fp32 master weights are initialized by the chosen method,
both from the master weights if there are any. The optimizer's first moment of a new row is 0. Its
second moment is the mean over the old rows, so that the first updates of new rows are as large as
those of old ones; with 0, an update early in the decay window would be larger by up to (1 - beta1)
/ sqrt(1 - beta2).
"""

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from megatron_chatflow.checkpoint.index import read_index
from megatron_chatflow.checkpoint.reader import SafeReader
from megatron_chatflow.convert.distributed import (
    AVERAGE_PREFIX,
    MASTER_PREFIXES,
    DistributedReader,
)
from megatron_chatflow.convert.vocabulary import GrownVocabulary, grow_tensor
from megatron_chatflow.convert.weight_map import RULES
from megatron_chatflow.errors import UserError

# megatron-core's and Hugging Face's names of the tensors with one row for each vocabulary entry.
_VOCABULARY = {rule.megatron: rule.parts[0].name for rule in RULES if rule.has_vocabulary_rows}
_FIRST_MOMENT = "optimizer.state.exp_avg."
_SECOND_MOMENT = "optimizer.state.exp_avg_sq."


class GrownReader(SafeReader):
    """A `SafeReader` that grows tensors of the vocabulary."""

    def __init__(self, folder: Path, grown: GrownVocabulary, num_rows: int) -> None:
        """Opens an ``iter_`` folder for a model of ``num_rows`` rows, including padding."""
        super().__init__(folder)
        self._folder = folder
        self._grown = grown
        self._num_rows = num_rows

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Returns the index with the new number of vocabulary rows."""
        index = read_index(self._folder)
        for name, entry in index.state_dict_metadata.items():
            if _vocabulary_tensor(name) is not None and isinstance(entry, TensorStorageMetadata):
                size = torch.Size((self._num_rows, *entry.size[1:]))
                index.state_dict_metadata[name] = TensorStorageMetadata(
                    TensorProperties(dtype=entry.properties.dtype),
                    size,
                    [ChunkStorageMetadata(offsets=torch.Size((0,) * len(size)), sizes=size)],
                )
        return index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads the items of a plan, with one grown tensor in memory at a time."""
        stored = [item for item in plan.items if _vocabulary_tensor(item.storage_index.fqn) is None]
        done = super().read_data(LoadPlan(stored, plan.storage_data, plan.planner_data), planner)
        reader = DistributedReader(self._folder)
        asked = [
            item for item in plan.items if _vocabulary_tensor(item.storage_index.fqn) is not None
        ]
        for name in dict.fromkeys(item.storage_index.fqn for item in asked):
            whole = self._grow(reader, name)
            for item in asked:
                if item.storage_index.fqn != name:
                    continue
                box = tuple(
                    slice(first, first + length)
                    for first, length in zip(item.storage_offsets, item.lengths, strict=True)
                )
                target = planner.resolve_tensor(item).detach()
                target.copy_(whole[box])
                planner.commit_tensor(item, target)
        return done

    def _grow(self, reader: DistributedReader, name: str) -> torch.Tensor:
        """Returns a stored tensor with rows for new entries, then padding rows of zeros."""
        prefix, megatron = _vocabulary_tensor(name) or ("", name)
        growth = self._grown.growth
        # New rows of weights are the rounded new rows of master weights.
        masters = [m + megatron for m in MASTER_PREFIXES if m + megatron in reader.tensors]
        is_weight = prefix in ("", *MASTER_PREFIXES)
        source = masters[0] if is_weight and masters else name
        # The new rows of the average are made from its own old rows.
        is_weight = is_weight or prefix == AVERAGE_PREFIX
        self._check_rows(reader, source, name)
        rows = reader.read_whole(source)[: self._grown.num_old_rows]
        if is_weight:
            made = grow_tensor(_VOCABULARY[megatron], rows, growth, self._grown.resize)
        else:
            made = torch.zeros(growth.num_rows, *rows.shape[1:], dtype=rows.dtype)
            made[: len(rows)] = rows
            if prefix == _SECOND_MOMENT:
                made[growth.num_old : growth.num_old + len(growth.pieces)] = rows[
                    : growth.num_old
                ].mean(dim=0)
        whole = torch.zeros(
            self._num_rows, *made.shape[1:], dtype=reader.tensors[name].properties.dtype
        )
        whole[: len(made)] = made
        if source != name:  # old rows keep their stored bits, whatever the master weights are
            known = reader.read_whole(name)[: growth.num_old]
            whole[: growth.num_old] = known
        return whole

    def _check_rows(self, reader: DistributedReader, source: str, name: str) -> None:
        """Checks that stored tensors fit the vocabulary that the checkpoint had."""
        row = reader.tensors[name].size[1:]
        for stored in (source, name):
            entry = reader.tensors[stored]
            is_whole = len(entry.size) > 0 and entry.size[0] >= self._grown.num_old_rows
            if not is_whole or entry.size[1:] != row:
                raise UserError(
                    f"{self._folder}: {stored} has shape {list(entry.size)}, but the vocabulary "
                    f"has {self._grown.num_old_rows} rows; load another checkpoint"
                )
            if not entry.properties.dtype.is_floating_point:
                raise UserError(
                    f"{self._folder}: {stored} is {entry.properties.dtype}, not a floating-point "
                    "tensor; load another checkpoint"
                )


def _vocabulary_tensor(name: str) -> tuple[str, str] | None:
    """Returns prefix and megatron-core's name of a vocabulary tensor; None for any other."""
    for prefix in ("", *MASTER_PREFIXES, AVERAGE_PREFIX, _FIRST_MOMENT, _SECOND_MOMENT):
        if name.startswith(prefix) and name[len(prefix) :] in _VOCABULARY:
            return prefix, name[len(prefix) :]
    return None
