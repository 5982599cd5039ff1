"""Whether a Hugging Face folder holds the tensors that its config.json promises.

In: the folder's headers and the model's shape. Out: nothing, or what does not fit, by name.
"""

import torch

from megatron_chatflow.checkpoint.convert_safetensors import HuggingFaceWeights
from megatron_chatflow.checkpoint.convert_shape import LlamaShape
from megatron_chatflow.checkpoint.weight_map import huggingface_shapes
from megatron_chatflow.errors import UserError

# Buffers that older transformers stored and that follow from the configuration.
_DERIVED_SUFFIXES = (".rotary_emb.inv_freq",)
_TIED = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"


def check_weights(weights: HuggingFaceWeights, shape: LlamaShape) -> None:
    """Compares a folder's tensors with what config.json promises.

    Raises:
        UserError: A tensor is missing or quantised, has another shape, or is none of a LLaMA's.
    """
    expected = huggingface_shapes(shape)
    missing = [name for name in expected if name not in weights.files]
    if missing:
        raise UserError(
            f"{weights.folder}: {len(missing)} tensors are missing, the first is {missing[0]}"
        )
    for name, size in expected.items():
        weights.dtype(name)  # refuses what is quantised
        if weights.shape(name) != size:
            raise UserError(
                f"{weights.files[name]}: {name} is {list(weights.shape(name))} and config.json "
                f"makes it {list(size)}; the two belong to different models"
            )
    for name in weights.files:
        if name in expected or name.endswith(_DERIVED_SUFFIXES):
            continue
        if name == _TIED and _is_embedding(weights, name):
            continue  # tied, and stored all the same
        raise UserError(
            f"{weights.files[name]}: {name} is no tensor of this LLaMA; config.json leaves it out"
        )


def _is_embedding(weights: HuggingFaceWeights, name: str) -> bool:
    """Whether a tensor holds the embedding's values; refuses what is quantised."""
    is_alike = weights.dtype(name) == weights.dtype(_EMBEDDING) and (
        weights.shape(name) == weights.shape(_EMBEDDING)
    )
    return is_alike and torch.equal(weights.read(name), weights.read(_EMBEDDING))
