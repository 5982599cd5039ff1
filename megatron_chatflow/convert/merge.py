"""Merges the weights of several models of one shape, such as branches of a run.

- ``mean``: the weighted mean of the models (Wortsman et al., "Model soups", 2022).
- ``slerp``: spherical interpolation between two models, tensor by tensor (Shoemake, 1985). It keeps
  the norm where the models point in different directions; nearly parallel tensors are interpolated
  linearly.
- ``task_vectors``: a base model plus weighted differences from it (Ilharco et al., "Editing Models
  with Task Arithmetic", 2023).

Sums are computed in fp32, with one tensor of one model in memory besides the sum. A checkpoint's
fp32 master weights are read where it has them.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from megatron_chatflow.convert.distributed import DistributedReader
from megatron_chatflow.convert.from_huggingface import huggingface_tokenizer
from megatron_chatflow.convert.safetensors import HuggingFaceWeights, write_shards
from megatron_chatflow.convert.shape import (
    DTYPES,
    TORCH_NAMES,
    LlamaShape,
    shape_of_huggingface,
    trained_shape,
)
from megatron_chatflow.convert.template import TokenizerChoice, files_of_export
from megatron_chatflow.convert.to_huggingface import (
    MAX_SHARD_BYTES,
    Converted,
    check_shapes,
    find_checkpoint,
    read_weight,
    run_tokenizer,
)
from megatron_chatflow.convert.weight_map import check_weights, huggingface_shapes, placements
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import check_new_folder, new_folder
from megatron_chatflow.tokenizer import Tokenizer
from megatron_chatflow.tokenizer.small_files import (
    MODEL_CONFIG,
    SmallFiles,
    json_bytes,
    read_model_files,
    write_small_files,
)

Method = Literal["mean", "slerp", "task_vectors"]

_PARALLEL = 1e-4  # radians below which tensors count as parallel

# Hugging Face tensors by name, of one of `placements`.
Tensors = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class _Model:
    """A model to merge: a Hugging Face folder or a checkpoint."""

    path: Path
    shape: LlamaShape
    dtype: torch.dtype  # of its weights, not of the master weights
    tokenizer: Tokenizer | None
    read: Callable[[tuple[Any, int | None]], Tensors]
    small_files: Callable[[torch.dtype], SmallFiles]  # for weights of a dtype


def merge_models(
    models: Sequence[Path],
    output: Path,
    *,
    method: Method = "mean",
    weights: Sequence[float] | None = None,
    base: Path | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> Converted:
    """Writes the merged model as a Hugging Face folder, with the small files of the first model.

    Args:
        models: Hugging Face folders, runs' folders, or their ``iter_`` folders.
        output: The new folder, which appears when it is complete.
        method: See the module.
        weights: One weight per model; equal weights if None (1 each for task vectors). Those of a
            mean or an interpolation are divided by their sum.
        base: The base model of task vectors.
        dtype: ``fp32``, ``bf16`` or ``fp16``; None keeps that of the first model.
        max_shard_bytes: The largest size of a safetensors file in bytes.
        overwrite: Whether an existing folder of that name is replaced.

    Raises:
        UserError: The models do not fit together, or the folder cannot be written.
    """
    check_new_folder(output, overwrite=overwrite, mark=MODEL_CONFIG)
    factors = _factors(method, models, weights, base)
    opened = [_open(path) for path in models]
    origin = None if base is None else _open(base)
    first = opened[0]
    for other in [*opened[1:], *([] if origin is None else [origin])]:
        _check_same(first, other)
    target = first.dtype if dtype is None else DTYPES[dtype]
    shapes = huggingface_shapes(first.shape)
    num_parameters = sum(torch.Size(size).numel() for size in shapes.values())
    num_bytes = num_parameters * target.itemsize

    def merged() -> Iterator[tuple[str, torch.Tensor]]:
        for place in tqdm(placements(first.shape), unit="tensor", desc="merge", disable=None):
            if method == "slerp":
                yield from _interpolated(opened, place, factors[1])
            else:
                yield from _summed(opened, factors, origin, place)

    files = first.small_files(target)
    with new_folder(output, overwrite=overwrite, mark=MODEL_CONFIG, num_bytes=num_bytes) as folder:
        write_shards(folder, shapes, target, merged(), max_shard_bytes)
        write_small_files(folder, files)
    return Converted(output, len(shapes), num_bytes, num_parameters)


def _factors(
    method: Method, models: Sequence[Path], weights: Sequence[float] | None, base: Path | None
) -> list[float]:
    """Returns the factor of each model, after checking that the arguments fit together."""
    if len(models) < (1 if method == "task_vectors" else 2):
        raise UserError(f"--models: {method} needs at least two models; give more")
    if method == "slerp" and len(models) != 2:
        raise UserError(
            f"--models: slerp interpolates between two models, and {len(models)} are given"
        )
    if (base is not None) != (method == "task_vectors"):
        state = "is set" if base is not None else "is missing"
        raise UserError(
            f"--base: {state}, and --method is {method}; task_vectors needs a base model, and the "
            "other methods have none"
        )
    given = [1.0] * len(models) if weights is None else list(weights)
    if len(given) != len(models):
        raise UserError(f"--weights: {len(given)} weights for {len(models)} models; give one each")
    if not all(map(math.isfinite, given)):
        raise UserError("--weights: must be finite numbers")
    if method == "task_vectors":
        return given
    total = sum(given)
    if min(given) < 0 or total == 0:
        raise UserError("--weights: must not be negative, and not all zero")
    return [weight / total for weight in given]


def _open(path: Path) -> _Model:
    if (path / MODEL_CONFIG).is_file():
        return _open_huggingface(path)
    if not path.is_dir():
        raise UserError(
            f"{path}: folder not found; give a Hugging Face folder or the folder of a run"
        )
    return _open_checkpoint(find_checkpoint(path))


def _open_huggingface(path: Path) -> _Model:
    shape = shape_of_huggingface(path)
    weights = HuggingFaceWeights(path)
    check_weights(weights, shape)

    def read(place: tuple[Any, int | None]) -> Tensors:
        rule, layer = place
        names = [part.name.format(layer=layer) for part in rule.parts]
        return [(name, weights.read(name)) for name in names]

    def small_files(dtype: torch.dtype) -> SmallFiles:
        files = read_model_files(path)
        config = json.loads(files[MODEL_CONFIG])
        key = "dtype" if "dtype" in config else "torch_dtype"
        if config.get(key, "float32") != TORCH_NAMES[dtype]:
            files[MODEL_CONFIG] = json_bytes({**config, key: TORCH_NAMES[dtype]})
        return files

    dtype = weights.dtype(next(iter(huggingface_shapes(shape))))
    return _Model(path, shape, dtype, huggingface_tokenizer(path), read, small_files)


def _open_checkpoint(path: Path) -> _Model:
    shape = trained_shape(path)
    stored = DistributedReader(path)
    check_shapes(stored, shape)
    reader = DistributedReader(path, masters=True)
    check_shapes(reader, shape)
    choice = TokenizerChoice(advice="put it back, or export the checkpoint and merge the export")
    tokenizer = run_tokenizer(path, choice)
    return _Model(
        path,
        shape,
        stored.dtype(*placements(shape)[0]),
        tokenizer,
        lambda place: read_weight(reader, shape, place),
        lambda dtype: files_of_export(path, choice, tokenizer, shape, dtype),
    )


def _check_same(first: _Model, other: _Model) -> None:
    """Checks that two models have the same shape and tokenizer."""
    one, two = (model.shape.recorded() for model in (first, other))
    for name in sorted(one.keys() | two.keys()):
        if one.get(name) != two.get(name):
            raise UserError(
                f"{other.path}: {name} is {two.get(name)}, and {one.get(name)} in {first.path}; "
                "only models of the same shape can be merged"
            )
    prints = {m.tokenizer.fingerprint for m in (first, other) if m.tokenizer is not None}
    if len(prints) > 1:
        raise UserError(
            f"{other.path}: has another tokenizer than {first.path}, so the rows of their "
            "embeddings stand for different tokens; merge models with the same tokenizer"
        )


def _summed(
    models: Sequence[_Model],
    factors: Sequence[float],
    base: _Model | None,
    place: tuple[Any, int | None],
) -> Tensors:
    """Returns ``base + sum of factor * (model - base)``, with a base of 0 if there is none."""
    terms = list(zip(models, factors, strict=True))
    if base is not None:
        terms = [(base, 1.0 - sum(factors)), *terms]
    sums: Tensors = []
    for model, factor in terms:
        for number, (name, tensor) in enumerate(model.read(place)):
            if number == len(sums):
                sums.append((name, tensor.float() * factor))
            else:
                sums[number][1].add_(tensor.float(), alpha=factor)
    return sums


def _interpolated(models: Sequence[_Model], place: tuple[Any, int | None], part: float) -> Tensors:
    """Returns the tensors ``part`` of the way on the arc from the first of two models."""
    results: Tensors = []
    for (name, one), (_, two) in zip(*(model.read(place) for model in models), strict=True):
        one, two = one.float(), two.float()
        norms = float(one.norm()) * float(two.norm())
        cosine = float(torch.dot(one.flatten(), two.flatten())) / norms if norms else 1.0
        angle = float(torch.tensor(cosine, dtype=torch.float64).clamp(-1.0, 1.0).arccos())
        if _PARALLEL < angle < torch.pi - _PARALLEL:
            angles = torch.tensor([(1.0 - part) * angle, part * angle, angle], dtype=torch.float64)
            left, right, whole = angles.sin().tolist()
            results.append((name, one * (left / whole) + two * (right / whole)))
        else:
            results.append((name, one * (1.0 - part) + two * part))
    return results
