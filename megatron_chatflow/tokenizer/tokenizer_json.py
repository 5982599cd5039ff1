"""Opens a `tokenizer.json` with the `tokenizers` library without trusting the file.

The library validates little. A chain of normalizers that multiply the text, padding to a length of
billions, or a damaged character map can make it allocate more memory than is available. Rust then
aborts the process, and Python cannot catch that. `parse_tokenizer_json` therefore limits the memory
that a file can require before the library reads it. Every other problem that the library finds is
an exception or a panic, and `library_errors` converts both to a `UserError`.

A check in a child process would need no limits, but it takes 0.2 s to start and doubles the loading
time in every process. These checks take 5 ms for 100,000 tokens.
"""

import base64
import binascii
import json
import math
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import tokenizers

from megatron_chatflow.config.fields import shorten
from megatron_chatflow.errors import UserError
from megatron_chatflow.errors import shorten as shorten_message

MAX_MODEL_BYTES = 256 << 20  # a tokenizer.json of 250,000 tokens has about 35 MB
_MAX_VALUES = 16_000_000  # 500,000 merges have 1.5 million; Python uses up to 100 bytes per value
_MAX_GROWTH = 256  # LLaMA's normalizer makes text at most 12 times longer
_MAX_NORMALIZED_BYTES = 64 << 20  # of all added tokens together
_MAX_TOKEN_LENGTH = 1 << 14  # characters of an added token
_MAX_AFFIX_LENGTH = 256  # characters added before or after a word
_MAX_TEMPLATE_TOKENS = 1 << 16  # tokens added around a text
_MAX_DEPTH = 100  # the library supports 128 levels of JSON
# Ids need not be dense, but memory is allocated for every id up to the largest.
_MAX_SPARE_IDS = 1_000_000
_MAX_IDS_PER_TOKEN = 8
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(data: bytes) -> Any:
    """Parses JSON with a limit on the number of values, which bounds the memory.

    Raises:
        ValueError: If the data is not JSON, is nested too deeply, has too many values, or contains
            a lone surrogate.
    """
    num_values = sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if len(data) > MAX_MODEL_BYTES or num_values > _MAX_VALUES:
        raise ValueError(f"{num_values:,} values in {len(data):,} bytes are too many")
    try:
        content = json.loads(data)
        if _SURROGATE.search(data):  # a lone surrogate cannot be encoded as UTF-8 again
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return content


def parse_tokenizer_json(data: bytes) -> dict[str, Any]:
    """Parses and checks a `tokenizer.json`, and removes truncation, padding and dropout.

    BPE dropout (Provilkov et al. 2020) skips merges at random, so the same text would have
    different ids in every run.

    Raises:
        ValueError: If the data is not a JSON object with a model, or a value exceeds a limit.
    """
    content = parse_json(data)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError("it is not a JSON object with a model")
    content |= {"truncation": None, "padding": None}
    dropout = content["model"].get("dropout")
    if type(dropout) in (int, float) and 0 < dropout <= 1:  # the library rejects other values
        content["model"] = {**content["model"], "dropout": None}
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        for component in _components(content.get(name)):
            _check_component(component)
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if len(str(content["model"].get(name) or "")) > _MAX_AFFIX_LENGTH:
            raise ValueError(f"its {name} is longer than {_MAX_AFFIX_LENGTH} characters")
    growth = max(_text_growth(content.get("normalizer")), _text_growth(content.get("decoder")))
    if growth > _MAX_GROWTH:
        raise ValueError(
            f"its normalizer or decoder can make text {growth:.3g} times longer; the maximum is "
            f"{_MAX_GROWTH} times"
        )
    _check_added_tokens(content.get("added_tokens"), growth)
    num_around = _template_growth(content.get("post_processor"))
    if num_around > _MAX_TEMPLATE_TOKENS:
        raise ValueError(f"its post-processor adds {num_around:.3g} tokens to a text")
    return content


def open_tokenizer_json(content: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Creates the library's tokenizer from the result of `parse_tokenizer_json`.

    It encodes the names of control tokens in text as text.

    Raises:
        ValueError: If the library rejects the content, or the ids are too sparse.
    """
    try:
        with without_panic_output():
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
            vocabulary = tokenizer.get_vocab()
    except BaseException as error:
        if not is_library_error(error):
            raise
        raise ValueError(error_text(error)) from error
    largest = max(vocabulary.values(), default=-1)
    if largest >= _MAX_SPARE_IDS + _MAX_IDS_PER_TOKEN * len(vocabulary):
        raise ValueError(f"its largest id is {largest}, but it has only {len(vocabulary)} tokens")
    tokenizer.encode_special_tokens = True
    return tokenizer


def is_library_error(error: BaseException) -> bool:
    """Returns whether an exception is an error or a panic of a Rust library.

    A panic is raised as a `PanicException`. It derives from `BaseException`, and each library
    defines its own class of this name.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def error_text(error: BaseException) -> str:
    """Returns the message of a Rust library's error as one short line."""
    return shorten_message(" ".join(str(error).split()), 300)


@contextmanager
def without_panic_output() -> Iterator[None]:
    """Suppresses the message that Rust prints to standard error for a panic.

    The message is redundant because a panic is also raised as an exception. Rust writes directly to
    file descriptor 2, so the descriptor is redirected to a file in memory during the call. All
    other content of that file, such as the output of other threads, is written to standard error
    afterwards. It is lost only if the whole process ends during the call.

    Does nothing in three cases: with RUST_BACKTRACE=full, on systems without memory files, and in
    threads other than the main thread, where the main thread could fork during the redirection.
    """
    is_wanted = os.environ.get("RUST_BACKTRACE") == "full"
    is_main = threading.current_thread() is threading.main_thread()
    if is_wanted or not is_main or not hasattr(os, "memfd_create"):
        yield
        return
    try:
        captured = os.memfd_create("stderr")
    except OSError:  # no file descriptor is free; the call itself reports its failure
        yield
        return
    try:
        standard_error = os.dup(2)
    except OSError:  # standard error is closed
        os.close(captured)
        yield
        return
    panic: BaseException | None = None
    try:
        with suppress(AttributeError, OSError, ValueError):  # sys.stderr may be None or closed
            sys.stderr.flush()
        os.dup2(captured, 2)
        yield
    except BaseException as error:
        panic = error if type(error).__name__ == "PanicException" else None
        raise
    finally:
        os.dup2(standard_error, 2)
        num_bytes = os.fstat(captured).st_size
        if num_bytes:
            text = os.pread(captured, num_bytes, 0)
            if panic is not None:
                text = _without_panic(text, str(panic).encode("utf-8", "surrogateescape"))
            with suppress(OSError):
                while text:
                    text = text[os.write(2, text) :]
        os.close(captured)
        os.close(standard_error)


def _without_panic(output: bytes, message: bytes) -> bytes:
    """Removes a panic from the output: its location, message, and optional backtrace and note."""
    pattern = (
        rb"\n?thread '[^\n]*panicked at [^\n]*\n(?:%b\n)?"
        rb"(?:stack backtrace:\n(?: [^\n]*\n)*)?(?:note: [^\n]*\n)?"
    )
    return re.sub(pattern % re.escape(message), b"", output)


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Converts errors and panics of a Rust library to a `UserError` that begins with ``what``."""
    try:
        with without_panic_output():
            yield
    except UserError:
        raise
    except BaseException as error:
        if not is_library_error(error):
            raise
        raise UserError(f"{what}: {error_text(error)}") from error


def _components(part: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """Yields a component and all components nested in it, in the order in which they run."""
    if depth > _MAX_DEPTH:
        raise ValueError("it is nested too deeply")
    if isinstance(part, dict):
        yield part
        part = list(part.values())
    if isinstance(part, list):
        for item in part:
            yield from _components(item, depth + 1)


def _check_component(component: Mapping[str, Any]) -> None:
    if "precompiled_charsmap" in component:
        try:
            trie = base64.b64decode(component["precompiled_charsmap"] or "", validate=True)
        except (TypeError, ValueError, binascii.Error):
            raise ValueError("its character map is damaged") from None
        # The library allocates memory for a trie of the size in the first four bytes.
        if len(trie) < 4 or int.from_bytes(trie[:4], "little") > len(trie) - 4:
            raise ValueError("its character map is damaged")


def _text_growth(part: Any) -> float:
    """Bounds the factor by which a chain of normalizers or decoders lengthens a text, in bytes.

    The factors of two replacements multiply only if one matches the output of the other. The
    function therefore keeps one bound for every character that replacements write, and one bound
    for all other characters.
    """
    written: dict[str, float] = {}
    others = 1.0
    for component in _components(part):
        is_prepend = "prepend" in component
        if is_prepend or "pattern" in component:
            text = component.get("prepend" if is_prepend else "content")
            text = text if isinstance(text, str) else ""
            num_bytes = len(text.encode("utf-8", "surrogatepass"))
            most = max([others, *written.values()])
            pattern = component.get("pattern")
            found = pattern.get("String") if isinstance(pattern, dict) else None
            if is_prepend:
                growth = others = most + num_bytes
                written = {}
            elif isinstance(found, str) and found:
                before = max(written.get(character, others) for character in found)
                growth = before * num_bytes / len(found.encode("utf-8", "surrogatepass"))
            else:  # a regular expression may match the empty string before every character
                growth = others = most * (num_bytes + 1)
                written = {}
            for character in set(text):
                written[character] = max(growth, written.get(character, others))
        elif component.get("type") not in ("Sequence", None):  # may write any character
            others = max([others, *written.values()])
            written = {}
        if others == math.inf:
            break
    return max([others, *written.values()])


def _check_added_tokens(tokens: Any, growth: float) -> None:
    lengths = [0]
    for token in tokens if isinstance(tokens, list) else []:
        text = token.get("content") if isinstance(token, dict) else None
        if isinstance(text, str):
            if len(text) > _MAX_TOKEN_LENGTH:
                raise ValueError(f"an added token is too long: {shorten(text)}")
            lengths.append(4 * len(text))
    if sum(lengths) * growth > _MAX_NORMALIZED_BYTES:
        raise ValueError("its normalizer makes the added tokens too long")


def _template_growth(part: Any) -> float:
    """Returns an upper bound of the number of tokens that post-processors make of one token."""
    growth = 1.0
    for component in _components(part):
        if component.get("type") == "TemplateProcessing":
            named = component.get("special_tokens")
            tokens = named.values() if isinstance(named, dict) else []
            listed = [token.get("ids") for token in tokens if isinstance(token, dict)]
            longest = max([1, *(len(ids) for ids in listed if isinstance(ids, list))])
            parts = [component.get(name) for name in ("single", "pair")]
            growth *= longest * max([1, *(len(p) for p in parts if isinstance(p, list))])
            if growth > _MAX_TEMPLATE_TOKENS:
                break
    return growth
