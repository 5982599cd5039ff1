"""Generates text with transformers, streams it, and holds conversations.

Sampling is seeded, so the output is reproducible on the same machine. The module also defines the
command-line flags that all generating tools share.
"""

import argparse
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import torch

from megatron_chatflow.errors import UserError
from megatron_chatflow.evaluation.models import (
    bos_prefix,
    load_pretrained,
    longest_input,
    with_prefix,
)
from megatron_chatflow.tokenizer.chat_template import render, template_variables
from megatron_chatflow.tokenizer.documents import TemplateLimitError

logger = logging.getLogger(__name__)
Write = Callable[[str], None]


@dataclass(frozen=True)
class Sampling:
    """Sampling settings."""

    max_new_tokens: int = 256  # maximum number of tokens in an answer
    temperature: float = 0.7  # divisor of the logits; 0 selects the most likely token
    top_p: float = 0.9  # sample from the most likely tokens whose probabilities sum to this value
    seed: int | None = 0  # seed; None for a random one
    stop: tuple[str, ...] = ()  # texts that end the answer; they are not part of it

    def __post_init__(self) -> None:
        """Raises `UserError` if a value is out of range."""
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens: must be at least 1, not {self.max_new_tokens}")
        if not 0 <= self.temperature <= 100:
            raise UserError(f"--temperature: must be between 0 and 100, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p: must be above 0 and at most 1, not {self.top_p}")


class TextStream:
    """Decodes ids one by one and writes text that can no longer change.

    A token may end within a character, and a stop text may be split over several tokens.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str], write: Write):
        """Initializes an empty stream, which passes each new part of the text to ``write``."""
        self.text = ""
        self.is_stopped = False
        self._decode = decode
        self._stop = [text for text in stop if text]
        self._write = write
        self._ids: list[int] = []

    def put(self, token_id: int) -> None:
        """Adds the next id."""
        if self.is_stopped:
            return
        self._ids.append(token_id)
        text = self._decode(self._ids)
        cut = min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=-1)
        if cut >= 0:
            self.is_stopped = True
            self._show(text[:cut])
        else:
            self._show(text[: len(text) - self._num_unstable(text)])

    def end(self) -> str:
        """Writes the remaining text and returns the whole text."""
        if not self.is_stopped:
            self._show(self._decode(self._ids))
        return self.text

    def _show(self, text: str) -> None:
        if len(text) > len(self.text):
            # Appended, because invalid bytes can change the text before them.
            piece = text[len(self.text) :]
            self.text += piece
            self._write(piece)

    def _num_unstable(self, text: str) -> int:
        """Returns the number of trailing characters that may still change or become a stop text."""
        num_broken = len(text) - len(text.rstrip("\ufffd"))
        begun = [
            length
            for stop in self._stop
            for length in range(1, len(stop))
            if text.endswith(stop[:length])
        ]
        return max([num_broken, *begun])


class Generator:
    """A model with its tokenizer that generates text.

    Attributes:
        folder: The Hugging Face folder.
        max_length: Maximum number of tokens of prompt and answer together.
    """

    def __init__(self, folder: Path, template_kwargs: str = "{}") -> None:
        """Loads a Hugging Face folder, on a GPU if there is one.

        ``template_kwargs`` are variables of the chat template as JSON; see `template_variables`.

        Raises:
            UserError: It is not a Hugging Face folder, has no tokenizer, or transformers is not
                installed.
        """
        self.folder = folder
        self._variables = dict(template_variables(template_kwargs))
        self._tokenizer, self._model = load_pretrained(folder)
        self.max_length = longest_input(folder, self._model)

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self._tokenizer.chat_template is not None

    def encode(self, text: str) -> list[int]:
        """Encodes a text, after BOS if the tokenizer adds it."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return with_prefix(ids, bos_prefix(self._tokenizer))

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Encodes OpenAI messages, the last one from the user, up to the model's answer.

        Raises:
            UserError: The folder has no chat template, or it rejects the conversation.
        """
        if not self.has_chat_template:
            raise UserError(f"{self.folder}: has no chat template; set one with --chat-template")
        try:
            # Not apply_chat_template, which does not limit time and memory.
            prompt = render(
                self._tokenizer.get_chat_template(),
                {
                    "messages": [dict(message) for message in messages],
                    "add_generation_prompt": True,
                    "tools": None,
                    "documents": None,
                    "strftime_now": lambda form: datetime.now().strftime(form),
                    **self._variables,
                    **self._tokenizer.special_tokens_map,
                },
            )
        except TemplateLimitError as error:
            raise UserError(
                f"{self.folder}: its chat template {error.limit} for this conversation; set "
                "another one with --chat-template"
            ) from None
        except Exception as error:  # from Jinja or from Python code in the template
            reason = str(error) or type(error).__name__
            raise UserError(
                f"{self.folder}: its chat template rejects this conversation ({reason}); it may "
                "be damaged or not support system messages"
            ) from None
        ids: list[int] = self._tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return with_prefix(ids, bos_prefix(self._tokenizer))

    def num_free_tokens(self, prompt: Sequence[int]) -> int:
        """Returns the maximum number of tokens in an answer to a prompt.

        Raises:
            UserError: The prompt is empty, or as long as the model's context.
        """
        if not prompt:
            raise UserError("the prompt is empty; provide some text")
        room = self.max_length - len(prompt)
        if room < 1:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, but the context of the model is "
                f"{self.max_length}; shorten the prompt"
            )
        return room

    @torch.no_grad()
    def stream(self, prompt: Sequence[int], sampling: Sampling, write: Write) -> str:
        """Continues a prompt of at least one id; ``write`` receives each part of the text.

        Raises:
            UserError: The prompt is empty, or too long for the model.
        """
        room = self.num_free_tokens(prompt)
        # Decode together with the end of the prompt, so that a leading space is kept.
        tail = list(prompt[-8:])
        num_known = len(self._decode(tail))
        stream = TextStream(lambda ids: self._decode(tail + ids)[num_known:], sampling.stop, write)
        generator = torch.Generator(self._model.device)
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed)
        for token_id in self._ids(prompt, min(sampling.max_new_tokens, room), sampling, generator):
            stream.put(token_id)
            if stream.is_stopped:
                break
        return stream.end()

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _ids(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        generator: torch.Generator,
    ) -> Iterator[int]:
        """Generates ids until an end token, with the key-value cache of transformers."""
        ends = self._end_ids()
        device = self._model.device
        # transformers 5.24 renamed the argument and the output `past_key_values`.
        parameters = inspect.signature(self._model.forward).parameters
        name = "cache" if "cache" in parameters else "past_key_values"
        cache = None
        ids = torch.tensor([list(prompt)], device=device)
        for _ in range(max_new_tokens):
            output = self._model(input_ids=ids, use_cache=True, **{name: cache})
            cache = output[name]
            token_id = sample_token(output.logits[0, -1].float(), sampling, generator)
            if token_id in ends:
                return
            yield token_id
            ids = torch.tensor([[token_id]], device=device)

    def _end_ids(self) -> set[int]:
        """Returns the model's end tokens and the token that ends a turn of its chat template."""
        configured = self._model.generation_config.eos_token_id
        ends = set(configured if isinstance(configured, list) else [configured])
        ends |= {self._tokenizer.eos_token_id}
        template = self._tokenizer.chat_template or ""
        for token in ("<|im_end|>", "<|eot_id|>"):
            if token in template:
                ends.add(self._tokenizer.convert_tokens_to_ids(token))
        return ends - {None, self._tokenizer.unk_token_id}


class Conversation:
    """A conversation, whose oldest turns are dropped once it no longer fits into the context.

    Attributes:
        messages: OpenAI messages so far, without the system message.
    """

    def __init__(self, generator: Generator, sampling: Sampling, system: str | None = None) -> None:
        """Starts a conversation; each answer uses the next seed.

        Raises:
            UserError: The model has no chat template, or it does not support system messages.
        """
        self._generator = generator
        self._sampling = sampling
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = []
        generator.encode_chat([*self._system, {"role": "user", "content": "?"}])

    def reset(self) -> None:
        """Drops all messages but the system message."""
        self.messages = []

    def answer(self, text: str, write: Write) -> int:
        """Generates an answer, passes its parts to ``write`` and appends both messages.

        If an exception interrupts the answer, the part so far is kept. Returns the number of oldest
        messages that were dropped to make room.

        Raises:
            UserError: The message is longer than the model's context; the conversation is
                unchanged.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._generator.encode_chat(self._system + messages)
        room = min(self._sampling.max_new_tokens, self._generator.max_length // 4)
        while len(messages) > 1 and len(ids) + room > self._generator.max_length:
            del messages[:2]
            ids = self._generator.encode_chat(self._system + messages)
        self._generator.num_free_tokens(ids)
        num_forgotten = len(self.messages) + 1 - len(messages)
        self.messages = messages
        pieces: list[str] = []

        def keep(piece: str) -> None:
            pieces.append(piece)
            write(piece)

        sampling = self._sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + len(self.messages) // 2)
        try:
            self._generator.stream(ids, sampling, keep)
        finally:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})
        return num_forgotten


def sample_token(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Samples the id of the next token from logits, float32[vocab_size].

    Top-p: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020.

    Raises:
        UserError: A logit is not finite.
    """
    if not logits.isfinite().all():
        raise UserError(
            "the model computes logits that are not finite: its weights or its config.json are "
            "damaged; use another copy"
        )
    if sampling.temperature == 0:
        return int(logits.argmax())
    ordered, ids = torch.sort((logits / sampling.temperature).softmax(-1), descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.where(
        before < sampling.top_p, ordered, 0.0
    )  # the most likely token is always kept
    return int(ids[torch.multinomial(kept, 1, generator=generator)])


TEMPLATE_HELP = (
    "chat template to use instead of the model's: the name of a built-in one (chatflow, llama3, "
    "qwen2.5, ...), or a file or folder with one"
)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of sampling, chat template and tokenizer."""
    add = parser.add_argument
    kinds: dict[str, tuple[type, str]] = {
        "--max-new-tokens": (int, "maximum number of tokens to generate"),
        "--temperature": (float, "0 always selects the most likely token"),
        "--top-p": (float, "probability mass of nucleus sampling"),
        "--seed": (int, "random seed"),
    }
    for flag, (kind, text) in kinds.items():
        default = getattr(Sampling(), flag[2:].replace("-", "_"))
        add(flag, type=kind, default=default, help=f"{text}; default: %(default)s")
    add("--stop", action="append", default=[], help="stop generating at this text (repeatable)")
    add("--chat-template", metavar="T", help=TEMPLATE_HELP)
    add(
        "--chat-template-kwargs",
        metavar="JSON",
        default="{}",
        help="variables of the chat template, such as '{\"enable_thinking\": false}'",
    )
    add("--tokenizer-model", type=Path, metavar="M", help="tokenizer to use instead of the model's")


def read_prompt(text: str) -> str:
    """Returns a prompt, or reads it from standard input for ``-``.

    Raises:
        UserError: It is not UTF-8.
    """
    raw = sys.stdin.buffer.read() if text == "-" else os.fsencode(text)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt: is not valid UTF-8 at byte {error.start}; convert it to UTF-8"
        ) from None


def sampling_from_args(args: argparse.Namespace) -> Sampling:
    """Builds the sampling settings from parsed flags."""
    return Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        stop=tuple(args.stop),
    )
