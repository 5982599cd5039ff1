"""A model that says how likely text is: log-probabilities of token ids, by transformers.

Models of Hugging Face folders in memory, by transformers.

A folder whose tensors are not all there, or not all used, is refused, where transformers would go
on with random ones. The tokenizer begins a text as the folder's configuration says
(`adds_bos_token`), whatever transformers' version does with `add_bos_token`.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_chatflow.config.huggingface import ARCHITECTURES, read_huggingface_config
from megatron_chatflow.convert.from_huggingface import check_weights
from megatron_chatflow.convert.safetensors import HuggingFaceWeights
from megatron_chatflow.convert.shape import TORCH_NAMES, shape_of_huggingface
from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.templates import JINJA_TEMPLATES
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.base import adds_bos_token, read_bounded, sha256_of
from megatron_chatflow.tokenizer.chat_template import JinjaTemplate, find_chat_template
from megatron_chatflow.tokenizer.tokenizer_json import (
    error_text,
    is_library_error,
    parse_tokenizer_json,
    without_panic_output,
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
        with without_panic_output():
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


def bos_prefix(tokenizer: Any) -> list[int]:
    """What a tokenizer of transformers puts before every text: BOS for LLaMA-2, often nothing."""
    ids: list[int] = tokenizer("a")["input_ids"]
    return [token_id for token_id in ids[:1] if token_id == tokenizer.bos_token_id]


def with_prefix(ids: Sequence[int], prefix: Sequence[int]) -> list[int]:
    """Ids behind what texts begin with, unless they begin so (a chat template may write BOS)."""
    num_prefix = len(prefix)
    return list(ids) if list(ids[:num_prefix]) == list(prefix) else [*prefix, *ids]


FloatArray = npt.NDArray[np.float64]
_MAX_LOGITS = 2**27  # float32 values of one batch's logits: half a gibibyte


class LanguageModel:
    """A model and its tokenizer.

    Attributes:
        folder: The Hugging Face folder.
        tokenizer: Ids as training had them.
        prefix_ids: What every text begins with: BOS where the model's tokenizer is configured so,
            otherwise nothing.
        chat_template: The folder's own; None if it has none. One of the built-in templates is
            given by its name.
        max_length: The most tokens that it reads at once.
        theirs: Tokenizer and model of transformers.
    """

    def __init__(self, folder: Path, max_length: int | None = None) -> None:
        """Loads a Hugging Face folder, on a GPU where one is there.

        Args:
            folder: The folder.
            max_length: Read no more than this at once.

        Raises:
            UserError: It is no such folder, or has no tokenizer.
        """
        self.folder = folder
        self.theirs = load_pretrained(folder)
        self._model = self.theirs[1]
        self.tokenizer = load_tokenizer(folder)
        self.prefix_ids = bos_prefix(self.theirs[0])
        self._own_template = find_chat_template(folder)
        self.chat_template = self._chat_template()
        longest = int(self._model.config.max_position_embeddings)
        self.max_length = longest if max_length is None else min(longest, max_length)

    def _chat_template(self) -> JinjaTemplate | str | None:
        own = self._own_template
        if own is None:
            return None
        for name, source in JINJA_TEMPLATES.items():
            if source == own.source:
                return name
        names = tuple(sorted(self.tokenizer.special_tokens.items()))
        return replace(own, control_tokens=self.tokenizer.control_tokens, special_tokens=names)

    @cached_property
    def num_prefix_bytes(self) -> int:
        """Bytes that the tokenizer puts before a text: 1 where it writes a space there, else 0."""
        num_bytes = self.tokenizer.num_bytes_per_id
        first, other = self.tokenizer.encode("a"), self.tokenizer.encode_continuation("a")
        return max(0, int(num_bytes[first].sum() - num_bytes[other].sum()))

    def facts(self) -> dict[str, Any]:
        """What decides about the ids that this model is given, for a results file.

        Returns:
            ``tokenizer`` (its hash and size), ``begins_with`` (the token that texts begin with, or
            None) and ``chat_template`` (name or file, and hash; None where there is none).
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
            "begins_with": self.theirs[0].bos_token if self.prefix_ids else None,
            "chat_template": template,
        }

    def log_probs(self, rows: Sequence[Sequence[int]]) -> list[FloatArray]:
        """Log-probability of every token but the first, given those before it.

        Args:
            rows: Token ids, each row at most `max_length` + 1 long.

        Returns:
            float64[len(row) - 1] for each row, in nats.
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
        """Log-probability of each candidate as the token that follows a row.

        Args:
            rows: Token ids.
            candidates: For each row, ids.

        Returns:
            float64[len(candidates)] for each row, in nats.
        """
        results: list[FloatArray] = [np.empty(0)] * len(rows)
        for batch in self._batches([len(row) for row in rows]):
            logits = self._logits([rows[i] for i in batch])
            for place, i in enumerate(batch):
                last = logits[place, len(rows[i]) - 1].log_softmax(dim=0)
                results[i] = last[list(candidates[i])].double().cpu().numpy()
        return results

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Groups rows of similar length so that a batch's logits stay within bounds."""
        limit = max(1, _MAX_LOGITS // int(self._model.config.vocab_size))
        batches: list[list[int]] = []
        for i in sorted((i for i, n in enumerate(lengths) if n > 0), key=lambda i: -lengths[i]):
            # The first of a batch is its longest row, to whose length the others are filled.
            if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= limit:
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches

    def _logits(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """float32[rows, longest, vocab_size]; a causal model does not see what fills a row up."""
        longest = max(map(len, rows))
        filled = [[*row, *([self.tokenizer.eos_id] * (longest - len(row)))] for row in rows]
        with torch.no_grad():
            ids = torch.tensor(filled, device=self._model.device)
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits
        return logits.float()
