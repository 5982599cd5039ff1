"""Loads weights from a Hugging Face folder directly into a model, at any parallel layout.

Every process reads only the rows and columns that it holds, one tensor at a time. For a larger
vocabulary it reads the whole tensors of the vocabulary, one after the other. A bf16 model gets
rounded weights, and its optimizer's fp32 master weights get the folder's values.
"""

import re
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor

from megatron_chatflow.checkpoint import megatron
from megatron_chatflow.checkpoint.state import MASTER, master_weights
from megatron_chatflow.convert.safetensors import HuggingFaceWeights
from megatron_chatflow.convert.shape import LlamaShape, shape_of_huggingface
from megatron_chatflow.convert.vocabulary import GrownVocabulary, grow_tensor
from megatron_chatflow.convert.weight_map import WeightRule, check_weights, rules_of, segments
from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime.launch import device_mode
from megatron_chatflow.runtime.ranks import Ranks

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


def load_huggingface(
    folder: Path,
    chunks: list[Any],
    ranks: Ranks,
    grown: GrownVocabulary | None = None,
    optimizer: Any = None,
) -> None:
    """Loads this process's part of the model.

    Args:
        folder: A Hugging Face folder whose shape is the model's.
        chunks: Model chunks, with or without gradient buffers around them.
        ranks: This process's place in the job.
        grown: The model's larger vocabulary, if any.
        optimizer: megatron-core's optimizer, whose master weights are loaded as well.
    """
    shape = shape_of_huggingface(folder)
    weights = HuggingFaceWeights(folder)
    check_weights(weights, shape)
    rules = {rule.megatron.replace("{layer}.", ""): rule for rule in rules_of(shape)}
    masters = {} if optimizer is None else master_weights(optimizer)
    with torch.no_grad(), device_mode(ranks.device):
        shards = [
            shard
            for chunk in chunks
            for shard in megatron.local_shards(getattr(chunk, "module", chunk))
        ]
        for _, of_parameter in groupby(shards, key=lambda shard: id(shard.parameter)):
            whole: torch.Tensor | None = None
            for shard in of_parameter:
                named = _LAYER.match(shard.name)
                layer = int(named[1]) if named else shard.layer
                rule = rules.get(_LAYER.sub("decoder.layers.", shard.name))
                if rule is None:
                    raise UserError(
                        f"{folder}: has no weights for {shard.name} of this model; check that "
                        "its config.json describes the same model"
                    )
                part = _read(weights, shape, rule, layer, shard, grown)
                is_fp8 = is_float8tensor(shard.parameter)
                if not is_fp8:
                    shard.data.copy_(part)
                if shard.parameter in masters or is_fp8:
                    if whole is None:
                        size = shard.parameter.shape
                        whole = torch.zeros(size, dtype=torch.float32, device="cpu")
                    shard.of_copy(whole).copy_(part)
            if whole is not None and is_float8tensor(shard.parameter):
                parameter = shard.parameter
                parameter.copy_(whole.to(parameter.device, parameter.dtype))
            if whole is not None and shard.parameter in masters:
                master = masters[shard.parameter]
                begin, values = master.state.begin, master.state.tensors[MASTER].view(-1)
                values.copy_(whole.view(-1)[begin : begin + values.numel()])
                master.store()


def _read(
    weights: HuggingFaceWeights,
    shape: LlamaShape,
    rule: WeightRule,
    layer: int | None,
    shard: megatron.LocalShard,
    grown: GrownVocabulary | None,
) -> torch.Tensor:
    """Reads a shard in the folder's dtype; padding rows of the vocabulary are zeros."""
    names = [part.name.format(layer=layer) for part in rule.parts]
    first, last = shard.begin[0], shard.begin[0] + shard.data.shape[0]
    columns = slice(None)
    if shard.data.dim() > 1:
        columns = slice(shard.begin[1], shard.begin[1] + shard.data.shape[1])
    if rule.has_vocabulary_rows and grown is not None:
        whole = grow_tensor(names[0], weights.read(names[0]), grown.growth, grown.resize)
        blocks = [whole[first:last, columns]]
    else:
        blocks = []
        at = 0
        for number, begin, count in segments(rule, shape):
            low, high = max(first, at), min(last, at + count)
            if low < high:
                rows = slice(begin + low - at, begin + high - at)
                blocks.append(weights.read(names[number], rows, columns))
            at += count
    num_rows = sum(map(len, blocks))
    if rule.has_vocabulary_rows and num_rows < last - first:
        width = shard.data.shape[1]
        blocks.append(torch.zeros(last - first - num_rows, width, device="cpu"))
    assert sum(map(len, blocks)) == last - first, f"{shard.name} has a wrong number of rows"
    return torch.cat(blocks) if len(blocks) > 1 else blocks[0]
