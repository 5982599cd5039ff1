"""Compares a checkpoint with a Hugging Face folder: weights bit for bit, logits with transformers.

The weights are compared tensor by tensor. Comparing the logits in fp32 needs both models in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_chatflow.convert.distributed import DistributedReader
from megatron_chatflow.convert.safetensors import HuggingFaceWeights
from megatron_chatflow.convert.shape import (
    LlamaShape,
    check_transformers,
    shape_of_huggingface,
    trained_shape,
)
from megatron_chatflow.convert.to_huggingface import check_shapes, find_checkpoint, read_weight
from megatron_chatflow.convert.weight_map import check_weights, placements
from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer import load_tokenizer

# fp32 has 24 bits, of which sums of a few thousand terms in another order lose a few.
TOLERANCE = 1e-4
TEXTS = (
    "The river had risen in the night, and nobody crossed the bridge before noon.",
    "今天早上下了一场大雨,路上的行人都打着伞。",
    "### Instruction:\nTranslate: good morning\n\n### Response:\n早上好",
)


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison."""

    num_tensors: int  # number of Hugging Face tensors compared
    different: tuple[str, ...]  # names of the tensors that differ in any bit
    # largest difference of the logits of all texts in fp32; None if the logits were skipped
    largest_difference: float | None = None
    largest_logit: float | None = None  # largest magnitude of the logits of transformers
    num_tokens: int = 0  # number of tokens whose logits were compared

    @property
    def is_same(self) -> bool:
        """Whether all weights are equal, and the logits are equal up to rounding."""
        if self.different:
            return False
        if self.largest_difference is None or self.largest_logit is None:
            return True
        return self.largest_difference <= TOLERANCE * max(1.0, self.largest_logit)


def compare(
    huggingface: Path, checkpoint: Path, texts: Sequence[str], *, weights_only: bool = False
) -> Comparison:
    """Compares weights, then logits for the texts unless ``weights_only``.

    Raises:
        UserError: One of the models is damaged, or their shapes differ.
    """
    checkpoint = find_checkpoint(checkpoint)
    shape = trained_shape(checkpoint)
    theirs = shape_of_huggingface(huggingface)
    free = {"init_method_std"}
    if shape.rope_scaling_type == "yarn":  # an export states the extended length
        free.add("max_position_embeddings")
    for name in LlamaShape.__dataclass_fields__:
        ours_value, their_value = getattr(shape, name), getattr(theirs, name)
        if ours_value != their_value and name not in free:
            raise UserError(
                f"{huggingface}: {name} is {their_value}, but {ours_value} in {checkpoint}; they "
                "are different models"
            )
    different, num_tensors = compare_weights(huggingface, checkpoint, shape)
    if weights_only:
        return Comparison(num_tensors, tuple(different))
    ids = token_ids(huggingface, texts, shape)
    expected = transformers_logits(huggingface, ids)
    actual = checkpoint_logits(checkpoint, shape, ids)
    differences = [a - b for a, b in zip(actual, expected, strict=True)]
    return Comparison(
        num_tensors,
        tuple(different),
        largest_magnitude(differences),
        largest_magnitude(expected),
        sum(len(sequence) for sequence in ids),
    )


def largest_magnitude(tensors: Sequence[torch.Tensor]) -> float:
    """Returns the largest magnitude in any tensor; NaN if any value is NaN."""
    return float(torch.stack([tensor.abs().max() for tensor in tensors]).max())


def compare_weights(
    huggingface: Path, checkpoint: Path, shape: LlamaShape
) -> tuple[list[str], int]:
    """Compares every tensor in the Hugging Face folder's dtype.

    Returns:
        Names of the tensors that differ, and the number of all tensors.
    """
    weights = HuggingFaceWeights(huggingface)
    check_weights(weights, shape)
    reader = DistributedReader(checkpoint)
    check_shapes(reader, shape)
    different, num_tensors = [], 0
    for placement in tqdm(placements(shape), unit="tensor", desc="verify", disable=None):
        for name, tensor in read_weight(reader, shape, placement):
            expected = weights.read(name)
            num_tensors += 1
            if not _same_bits(tensor.to(expected.dtype), expected):
                different.append(name)
    return different, num_tensors


def token_ids(huggingface: Path, texts: Sequence[str], shape: LlamaShape) -> list[list[int]]:
    """Encodes texts with the folder's tokenizer; without a tokenizer, bytes are used as ids."""
    names = ("tokenizer.model", "tokenizer.json")
    if any((huggingface / name).is_file() for name in names):
        encoded = load_tokenizer(huggingface).encode_batch(texts)
    else:
        encoded = [[byte % shape.vocab_size for byte in text.encode()] for text in texts]
    ids = [sequence[: shape.longest] for sequence in encoded if sequence]
    if not ids:
        raise UserError("--text: is empty; give some text to compare the logits on")
    return ids


def transformers_logits(huggingface: Path, ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Computes the logits of transformers in fp32, float32[tokens, vocab_size] by sequence."""
    try:
        from transformers import AutoModelForCausalLM, __version__
    except ImportError:
        raise UserError(
            "transformers is not installed; run pip install 'megatron-chatflow[hf]', or use "
            "--weights-only"
        ) from None
    check_transformers(__version__, shape_of_huggingface(huggingface))
    model: Any = AutoModelForCausalLM.from_pretrained(huggingface, local_files_only=True)
    model.float().eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([sequence])).logits[0] for sequence in ids]


def checkpoint_logits(
    checkpoint: Path, shape: LlamaShape, ids: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Computes the logits of megatron-core's model in this process, in fp32 on the CPU.

    Returns:
        float32[tokens, vocab_size] for each sequence.
    """
    from megatron_chatflow.runtime.launch import device_mode, initialize, running

    with running(initialize()) as ranks:
        # Imported after `initialize`, which replaces entry points for megatron-core on CPUs.
        from megatron_chatflow.checkpoint.store import load_weights
        from megatron_chatflow.config import ModelConfig, ParallelConfig, TrainConfig
        from megatron_chatflow.model.llama import build_llama
        from megatron_chatflow.model.packed import pack_tokens

        model = ModelConfig(**{n: getattr(shape, n) for n in LlamaShape.__dataclass_fields__})
        train = TrainConfig(
            train_iters=1,
            micro_batch_size=1,
            global_batch_size=1,
            bf16=False,
            transformer_impl="local",
            attention_backend="sdpa",
        )
        with device_mode(ranks.device):
            llama = build_llama(model, ParallelConfig(), train, ranks, vocab_size=shape.vocab_size)
        load_weights(checkpoint, llama.chunks, ranks)
        chunk = llama.chunks[0].eval()
        logits = []
        with torch.no_grad():
            for sequence in ids:
                packed = pack_tokens(
                    torch.tensor([0, len(sequence)], dtype=torch.int32),
                    # transformers computes the base of dynamic scaling for each text's length.
                    rotary=replace(llama.rotary, length=len(sequence)),
                    dtype=llama.dtype,
                    device=ranks.device,
                )
                tokens = torch.tensor([list(sequence)], device=ranks.device)
                hidden = chunk(tokens, None, None, packed_seq_params=packed)
                rows = llama.output_weight[: shape.vocab_size]
                logits.append((hidden.reshape(len(sequence), -1) @ rows.T).float().cpu())
    return logits


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Returns whether tensors are equal in every bit: NaN equals itself, -0 is not 0."""
    integer = torch.int32 if one.itemsize == 4 else torch.int16
    return torch.equal(one.contiguous().view(integer), other.contiguous().view(integer))


def describe(result: Comparison) -> str:
    """Formats a comparison in a few lines."""
    lines = [f"weights: all {result.num_tensors} tensors are bitwise equal"]
    if result.different:
        shown = ", ".join(result.different[:3])
        more = f" and {len(result.different) - 3} more" if len(result.different) > 3 else ""
        count = f"{len(result.different)} of {result.num_tensors}"
        lines = [f"weights: {count} tensors differ: {shown}{more}"]
    if result.largest_difference is not None:
        lines.append(
            f"logits: largest difference {result.largest_difference:.3e} over "
            f"{result.num_tokens} tokens in fp32 (largest logit {result.largest_logit:.3f})"
        )
    lines.append("same model" if result.is_same else "DIFFERENT models")
    return "\n".join(lines)
