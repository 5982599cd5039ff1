"""Initializes the weights of a new model, the same at every parallel layout.

Each matrix is drawn whole, from a generator seeded by the run's seed and the matrix's name in the
whole model, and every process keeps its shard. The model is therefore the same at every tensor,
pipeline and data-parallel size, while megatron-core's initialization depends on what else a process
holds. CPUs and GPUs have different random streams.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor

_LAYER = re.compile(r"(decoder\.layers\.)(\d+)\.")
# Residual branches end here: their standard deviation falls with the depth (Radford et al. 2019,
# "Language Models are Unsupervised Multitask Learners", section 2.3), as in megatron-core.
_BRANCH_ENDS = ("linear_proj.weight", "linear_fc2.weight")


def leave_unset(_weight: torch.Tensor) -> None:
    """An ``init_method`` for megatron-core that does nothing; `draw_weights` initializes."""


def draw_weights(
    chunk: Any,
    *,
    seed: int,
    num_layers: int,
    std: float,
    tensor_parallel_rank: int,
    tensor_parallel_size: int,
    unpadded_sizes: Mapping[str, tuple[int, int]],
) -> None:
    """Initializes every matrix of a `GPTModel`; weights of norms stay 1, and biases 0.

    Args:
        chunk: The model, or one pipeline chunk of it.
        seed: The run's seed.
        num_layers: Number of layers of the whole model.
        std: Standard deviation of the normal distribution.
        tensor_parallel_rank: This process's tensor-parallel rank.
        tensor_parallel_size: The tensor-parallel size.
        unpadded_sizes: Sizes of matrices with padded heads, see `config.shape.unpadded_sizes`.
    """
    for name, parameter in chunk.named_parameters():
        if parameter.dim() == 1:
            continue
        whole_name = _name_in_whole_model(name, chunk)
        is_branch_end = name.endswith(_BRANCH_ENDS)
        spread = std / math.sqrt(2 * num_layers) if is_branch_end else std
        # The gate and up halves of a gated layer are sharded separately.
        num_parts = 2 if name.endswith("linear_fc1.weight") else 1
        is_fp8 = is_float8tensor(parameter)
        values = parameter.data
        if is_fp8:
            values = torch.empty(values.shape, dtype=values.dtype, device=values.device)
        _draw(
            values,
            seed=_seed_of(seed, whole_name),
            std=spread,
            axis=int(parameter.partition_dim),
            unpadded_size=next(
                (size for end, (_, size) in unpadded_sizes.items() if name.endswith(end)), None
            ),
            num_parts=num_parts,
            rank=tensor_parallel_rank,
            size=tensor_parallel_size,
        )
        if is_fp8:
            with torch.no_grad():
                parameter.copy_(values)
            _keep_high_precision(parameter, values)


def _keep_high_precision(parameter: Any, values: torch.Tensor) -> None:
    """Lets megatron-core's optimizer initialize master weights with values before quantization.

    transformer-engine has kept those of the parameter's memory before it was initialized.
    """
    parameter.clear_high_precision_init_val()
    kept = [values.cpu()]
    parameter.get_high_precision_init_val = lambda: kept[0]
    parameter.clear_high_precision_init_val = kept.clear


def _name_in_whole_model(name: str, chunk: Any) -> str:
    """Returns the name with the layer's 0-based number in the whole model."""
    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    match = _LAYER.match(name)
    if match is None:
        return name
    layer = chunk.decoder.layers[int(match[2])]
    return f"{match[1]}{layer.layer_number - 1}.{name[match.end() :]}"


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _draw(
    weight: torch.Tensor,
    *,
    seed: int,
    std: float,
    axis: int,
    unpadded_size: int | None,
    num_parts: int,
    rank: int,
    size: int,
) -> None:
    """Fills this rank's shard of a matrix whose ``num_parts`` parts are each split along ``axis``.

    The matrix is drawn in its unpadded size; padding is zeros.
    """
    shape = list(weight.shape)
    shape[axis] *= size
    padded_size = shape[axis]
    shape[axis] = unpadded_size or padded_size
    generator = torch.Generator(weight.device).manual_seed(seed)
    whole = torch.empty(shape, dtype=torch.float32, device=weight.device)
    whole.normal_(0.0, std, generator=generator)
    shape[axis] = padded_size - shape[axis]
    whole = torch.cat((whole, whole.new_zeros(shape)), axis)
    slices = [part.chunk(size, axis)[rank] for part in whole.chunk(num_parts, axis)]
    weight.copy_(torch.cat(slices, axis))
