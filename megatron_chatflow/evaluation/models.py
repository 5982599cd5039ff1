"""Loads Hugging Face folders with transformers and computes log-probabilities of tokens.

A folder with missing or unused tensors is rejected; transformers would initialize missing tensors
randomly. The tokenizer adds BOS according to the folder's configuration (`adds_bos_token`),
independently of how the version of transformers treats `add_bos_token`.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_chatflow.config.architectures import ARCHITECTURES
from megatron_chatflow.config.huggingface import read_huggingface_config
from megatron_chatflow.convert.safetensors import HuggingFaceWeights
from megatron_chatflow.convert.shape import (
    TORCH_NAMES,
    LlamaShape,
    check_transformers,
    shape_of_huggingface,
)
from megatron_chatflow.convert.weight_map import check_weights
from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.templates import JINJA_TEMPLATES, TEMPLATES
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.base import adds_bos_token, read_bounded, sha256_of
from megatron_chatflow.tokenizer.chat_template import (
    JinjaTemplate,
    TemplateVariables,
    find_chat_template,
    with_default_variables,
)
from megatron_chatflow.tokenizer.tokenizer_json import (
    error_text,
    is_library_error,
    parse_tokenizer_json,
    without_panic_output,
)

TOKENIZER_JSON = "tokenizer.json"


def load_pretrained(folder: Path) -> tuple[Any, Any]:
    """Loads the tokenizer and model of a folder with transformers, on a GPU if there is one.

    The model has its stored dtype and is ready for inference.

    Raises:
        UserError: It is not a Hugging Face folder, is damaged, has no tokenizer, or
            transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(
            "transformers is not installed; run pip install 'megatron-chatflow[hf]'"
        ) from None
    shape = _trainable_shape(folder)
    if shape is not None:
        check_transformers(transformers.__version__, shape)
    library_logging: Any = transformers.utils.logging
    library_logging.set_verbosity_error()
    library_logging.disable_progress_bar()
    dtype = _dtype(folder)
    # Never run code from the folder, and never prompt for it.
    flags: Any = {"local_files_only": True, "trust_remote_code": False}
    what = "its tokenizer files"
    try:
        if (folder / TOKENIZER_JSON).is_file():
            parse_tokenizer_json(read_bounded(folder / TOKENIZER_JSON))
        with without_panic_output():
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, **flags)
        what = "it"
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, **flags
        )
    except BaseException as error:  # a damaged folder may raise anything
        if not is_library_error(error):
            raise
        text = error_text(error) or type(error).__name__
        raise _refusal(folder, f"transformers cannot load {what} ({text})") from None
    model, info = loaded
    for kind, fault in (("missing_keys", "is missing"), ("unexpected_keys", "is unexpected")):
        if info[kind]:
            name = min(info[kind])
            raise _refusal(folder, f"{name} {fault}; config.json and the weights do not match")
    _configure_bos(tokenizer, folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return tokenizer, model.to(device=device, dtype=dtype).eval()


def longest_input(folder: Path, model: Any) -> int:
    """Returns the longest input of a loaded model in tokens, extended by its rotary scaling."""
    shape = _trainable_shape(folder)
    return int(model.config.max_position_embeddings) if shape is None else shape.longest


def _trainable_shape(folder: Path) -> LlamaShape | None:
    """Returns a folder's shape; None if only transformers supports its architecture."""
    try:
        return shape_of_huggingface(folder)
    except UserError:
        return None


def _dtype(folder: Path) -> torch.dtype:
    config = read_huggingface_config(folder)
    named = config.get("torch_dtype") or config.get("dtype") or "float32"
    known = {name: dtype for dtype, name in TORCH_NAMES.items()}
    if not isinstance(named, str) or named not in known:
        raise UserError(
            f"{folder / 'config.json'}: torch_dtype is {named!r}; use one of {', '.join(known)}"
        )
    return known[named]


def _refusal(folder: Path, reason: str) -> UserError:
    """Returns the error of the converter if it finds a fault in the folder, else ``reason``."""
    try:
        weights = HuggingFaceWeights(folder)
        if read_huggingface_config(folder).get("model_type") in tuple(ARCHITECTURES):
            check_weights(weights, shape_of_huggingface(folder))
    except UserError as error:
        return error
    return UserError(f"{folder}: {reason}")


def _configure_bos(tokenizer: Any, folder: Path) -> None:
    """Makes the tokenizer add BOS if the folder is configured so, and no other tokens.

    transformers 5 ignores `add_bos_token` if there is a tokenizer.json.
    """
    names = ("tokenizer.json", "tokenizer.model")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        return  # vocab.json and merges.txt, which only transformers reads
    bos_id = tokenizer.bos_token_id
    begins = adds_bos_token(path, -1 if bos_id is None else bos_id)
    text: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    if tokenizer("a")["input_ids"] != ([bos_id] if begins else []) + text:
        tokenizer.add_eos_token = False
        tokenizer.add_bos_token = begins


def bos_prefix(tokenizer: Any) -> list[int]:
    """Returns the ids that a transformers tokenizer puts before every text: BOS or nothing."""
    ids: list[int] = tokenizer("a")["input_ids"]
    return [token_id for token_id in ids[:1] if token_id == tokenizer.bos_token_id]


def with_prefix(ids: Sequence[int], prefix: Sequence[int]) -> list[int]:
    """Prepends the prefix unless the ids start with it, as a chat template may write BOS."""
    num_prefix = len(prefix)
    return list(ids) if list(ids[:num_prefix]) == list(prefix) else [*prefix, *ids]


FloatArray = npt.NDArray[np.float64]
_MAX_LOGITS = 2**27  # float32 values of one batch's logits: half a gibibyte


class LanguageModel:
    """A model and its tokenizer.

    Attributes:
        folder: The Hugging Face folder.
        tokenizer: Tokenizer of this package, as in training.
        prefix_ids: Ids before every text: BOS if the tokenizer is configured so, otherwise empty.
        chat_template: Chat template of the folder, or the name of an equal built-in template; None
            if the folder has none.
        max_length: Maximum number of tokens read at once.
        hf_tokenizer: Tokenizer of transformers.
        hf_model: Model of transformers.
    """

    def __init__(
        self, folder: Path, max_length: int | None = None, variables: TemplateVariables = ()
    ) -> None:
        """Loads a Hugging Face folder, on a GPU if there is one.

        Args:
            folder: The folder.
            max_length: Maximum number of tokens read at once; None for the model's maximum.
            variables: Variables of the chat template.

        Raises:
            UserError: It is not a Hugging Face folder, has no tokenizer, or variables are given
                and it has no chat template.
        """
        self.folder = folder
        self.hf_tokenizer, self.hf_model = load_pretrained(folder)
        self.tokenizer = load_tokenizer(folder)
        self.prefix_ids = bos_prefix(self.hf_tokenizer)
        self._own_template = find_chat_template(folder)
        if variables:
            self._set_variables(variables)
        self.chat_template = self._chat_template()
        longest = longest_input(folder, self.hf_model)
        self.max_length = longest if max_length is None else min(longest, max_length)

    def _set_variables(self, variables: TemplateVariables) -> None:
        """Makes the template set variables, also where lm-eval applies it."""
        own = self._own_template
        if own is None:
            raise UserError(
                f"{self.folder}: has no chat template, and variables of one are given; use a model "
                "with a template, or remove them"
            )
        self._own_template = replace(
            own, source=with_default_variables(own.source, dict(variables))
        )
        self.hf_tokenizer.chat_template = self._own_template.source

    def _chat_template(self) -> JinjaTemplate | str | None:
        own = self._own_template
        if own is None:
            return None
        for name in TEMPLATES:
            if JINJA_TEMPLATES[name] == own.source:
                return name
        names = tuple(sorted(self.tokenizer.special_tokens.items()))
        return replace(own, control_tokens=self.tokenizer.control_tokens, special_tokens=names)

    @cached_property
    def num_prefix_bytes(self) -> int:
        """Number of bytes that the tokenizer adds before a text: 1 if it adds a space, else 0."""
        num_bytes = self.tokenizer.num_bytes_per_id
        first, other = self.tokenizer.encode("a"), self.tokenizer.encode_continuation("a")
        return max(0, int(num_bytes[first].sum() - num_bytes[other].sum()))

    def facts(self) -> dict[str, Any]:
        """Returns what determines this model's input ids, for a results file.

        These are ``tokenizer`` (hash and size), ``begins_with`` (the first token of texts, or None)
        and ``chat_template`` (name or file, and hash; None without one).
        """
        template, own = None, self._own_template
        if own is not None:
            name = self.chat_template if isinstance(self.chat_template, str) else own.name
            template = {"name": name, "sha256": sha256_of(own.source.encode())}
        return {
            "tokenizer": {
                "sha256": self.tokenizer.fingerprint,
                "vocab_size": self.tokenizer.vocab_size,
            },
            "begins_with": self.hf_tokenizer.bos_token if self.prefix_ids else None,
            "chat_template": template,
        }

    def log_probs(self, rows: Sequence[Sequence[int]]) -> list[FloatArray]:
        """Computes the log-probability of every token but the first, given its predecessors.

        Rows have at most `max_length` + 1 ids. Returns float64[len(row) - 1] for each row, in nats.
        """
        results: list[FloatArray] = [np.empty(0)] * len(rows)
        for batch in self._batches([len(row) - 1 for row in rows]):
            logits = self._logits([rows[i][:-1] for i in batch])
            for place, i in enumerate(batch):
                targets = torch.tensor(rows[i][1:], device=logits.device)
                here = logits[place, : len(targets)]
                chosen = here.gather(1, targets[:, None])[:, 0] - here.logsumexp(dim=1)
                results[i] = chosen.double().cpu().numpy()
        return results

    def next_log_probs(
        self, rows: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]]
    ) -> list[FloatArray]:
        """Computes the log-probability of each candidate id as the next token of a row.

        Returns float64[len(candidates)] for each row, in nats.
        """
        results: list[FloatArray] = [np.empty(0)] * len(rows)
        for batch in self._batches([len(row) for row in rows]):
            logits = self._logits([rows[i] for i in batch])
            for place, i in enumerate(batch):
                last = logits[place, len(rows[i]) - 1].log_softmax(dim=0)
                results[i] = last[list(candidates[i])].double().cpu().numpy()
        return results

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Groups rows of similar length into batches whose logits fit into `_MAX_LOGITS` values."""
        limit = max(1, _MAX_LOGITS // int(self.hf_model.config.vocab_size))
        batches: list[list[int]] = []
        for i in sorted((i for i, n in enumerate(lengths) if n > 0), key=lambda i: -lengths[i]):
            # The first row of a batch is its longest, to whose length the others are padded.
            if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= limit:
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches

    def _logits(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Computes float32[rows, longest, vocab_size]; causal attention never sees the padding."""
        longest = max(map(len, rows))
        filled = [[*row, *([self.tokenizer.eos_id] * (longest - len(row)))] for row in rows]
        with torch.no_grad():
            ids = torch.tensor(filled, device=self.hf_model.device)
            logits: torch.Tensor = self.hf_model(input_ids=ids, use_cache=False).logits
        return logits.float()
