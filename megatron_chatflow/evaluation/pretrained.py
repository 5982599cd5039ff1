"""Models of Hugging Face folders in memory, by transformers.

A folder whose tensors are not all there, or not all used, is refused, where transformers would go
on with random ones. The tokenizer begins a text as the folder's configuration says
(`adds_bos_token`), whatever transformers' version does with `add_bos_token`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_chatflow.checkpoint.convert_check import check_weights
from megatron_chatflow.checkpoint.convert_safetensors import HuggingFaceWeights
from megatron_chatflow.checkpoint.convert_shape import TORCH_NAMES, shape_of_huggingface
from megatron_chatflow.config.huggingface import ARCHITECTURES, read_huggingface_config
from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer.base import adds_bos_token, read_bounded
from megatron_chatflow.tokenizer.tokenizer_json import (
    error_text,
    is_library_error,
    parse_tokenizer_json,
)

TOKENIZER_JSON = "tokenizer.json"


def load_pretrained(folder: Path) -> tuple[Any, Any]:
    """Transformers' tokenizer and model of a folder, on a GPU where one is there.

    Args:
        folder: A Hugging Face folder.

    Returns:
        The tokenizer, and the model in its stored dtype, for inference.

    Raises:
        UserError: It is no such folder, is damaged, has no tokenizer, or transformers is missing.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(
            "transformers is not installed: pip install 'megatron-chatflow[hf]'"
        ) from None
    library_logging: Any = transformers.utils.logging
    library_logging.set_verbosity_error()
    library_logging.disable_progress_bar()
    dtype = _dtype(folder)
    # Code that lies in a folder is not run, and nobody is asked whether it may.
    flags: Any = {"local_files_only": True, "trust_remote_code": False}
    what = "its tokenizer files"
    try:
        if (folder / TOKENIZER_JSON).is_file():
            parse_tokenizer_json(read_bounded(folder / TOKENIZER_JSON))
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, **flags)
        what = "it"
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, **flags
        )
    except BaseException as error:  # whatever a damaged folder makes it raise
        if not is_library_error(error):
            raise
        text = error_text(error) or type(error).__name__
        raise _refusal(folder, f"transformers cannot load {what} ({text})") from None
    model, info = loaded
    for kind, fault in (("missing_keys", "is missing"), ("unexpected_keys", "is not its own")):
        if info[kind]:
            name = min(info[kind])
            raise _refusal(folder, f"{name} {fault}; config.json and weights do not fit together")
    _begin_texts_as_configured(tokenizer, folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return tokenizer, model.to(device=device, dtype=dtype).eval()


def _dtype(folder: Path) -> torch.dtype:
    """The dtype that config.json names."""
    config = read_huggingface_config(folder)
    named = config.get("torch_dtype") or config.get("dtype") or "float32"
    known = {name: dtype for dtype, name in TORCH_NAMES.items()}
    if not isinstance(named, str) or named not in known:
        raise UserError(
            f"{folder / 'config.json'}: torch_dtype is {named!r}; it can be {', '.join(known)}"
        )
    return known[named]


def _refusal(folder: Path, reason: str) -> UserError:
    """The converter's own words for what is wrong with a folder, if it finds a fault."""
    try:
        weights = HuggingFaceWeights(folder)
        if read_huggingface_config(folder).get("model_type") in tuple(ARCHITECTURES):
            check_weights(weights, shape_of_huggingface(folder))
    except UserError as error:
        return error
    return UserError(f"{folder}: {reason}")


def _begin_texts_as_configured(tokenizer: Any, folder: Path) -> None:
    """Has a tokenizer put BOS before a text where the folder says so, and nothing else anywhere.

    transformers 5 passes over `add_bos_token` where there is a tokenizer.json.
    """
    names = ("tokenizer.json", "tokenizer.model")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        return  # vocab.json and merges.txt, which only transformers reads here
    bos_id = tokenizer.bos_token_id
    begins = adds_bos_token(path, -1 if bos_id is None else bos_id)
    text: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    if tokenizer("a")["input_ids"] != ([bos_id] if begins else []) + text:
        tokenizer.add_eos_token = False
        tokenizer.add_bos_token = begins


def beginning_ids(tokenizer: Any) -> list[int]:
    """What a tokenizer of transformers puts before every text: BOS for LLaMA-2, often nothing."""
    ids: list[int] = tokenizer("a")["input_ids"]
    return [token_id for token_id in ids[:1] if token_id == tokenizer.bos_token_id]


def begun(ids: Sequence[int], beginning: Sequence[int]) -> list[int]:
    """Ids behind what texts begin with, unless they begin so (a chat template may write BOS)."""
    num_begin = len(beginning)
    return list(ids) if list(ids[:num_begin]) == list(beginning) else [*beginning, *ids]
