"""Provides any model as a Hugging Face folder, exporting a checkpoint to a temporary folder."""

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from megatron_chatflow.config.huggingface import read_huggingface_config
from megatron_chatflow.convert.template import TokenizerChoice
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import scratch_folder
from megatron_chatflow.preprocess.templates import template_source
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.small_files import (
    is_weights,
    read_model_files,
    replace_tokenizer,
    with_chat_template,
    write_small_files,
)

logger = logging.getLogger(__name__)


@contextmanager
def _exiting_on_sigterm() -> Iterator[None]:
    """Turns SIGTERM into an exception, so that temporary folders are removed."""

    def exit_on_signal(number: int, _frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    try:
        previous = signal.signal(signal.SIGTERM, exit_on_signal)
    except ValueError:  # only the main thread may install a handler
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _link_with_tokenizer(path: Path, choice: TokenizerChoice, folder: Path) -> None:
    """Creates a folder of links to a model's weights, with another tokenizer or chat template."""
    files = read_model_files(path)
    if choice.model is not None:
        tokenizer = load_tokenizer(choice.model)
        num_rows = read_huggingface_config(path).get("vocab_size")
        if isinstance(num_rows, int) and tokenizer.vocab_size > num_rows:
            raise UserError(
                f"{choice.model}: has {tokenizer.vocab_size} tokens, but the embedding of the "
                f"model only {num_rows} rows; {choice.advice}"
            )
        files = replace_tokenizer(files, tokenizer)
    if choice.chat_template is not None:
        files = with_chat_template(files, template_source(choice.chat_template))
    write_small_files(folder, files)
    for file in path.iterdir():
        if is_weights(file.name):
            (folder / file.name).symlink_to(file.resolve())


@contextmanager
def huggingface_folder(path: Path, choice: TokenizerChoice | None = None) -> Iterator[Path]:
    """Yields the Hugging Face folder of a model; a checkpoint is exported until the block ends.

    Args:
        path: A Hugging Face folder, a run's folder, or one of its ``iter_`` folders.
        choice: A tokenizer and chat template to replace those of the folder or the run.
    """
    if (path / "config.json").is_file():
        if choice is None or (choice.model is None and choice.chat_template is None):
            yield path
            return
        with _exiting_on_sigterm(), scratch_folder("chatflow_model_") as folder:
            changed = folder / (path.name or "model")
            _link_with_tokenizer(path, choice, changed)
            yield changed
        return
    if not path.is_dir():
        raise UserError(
            f"{path}: folder not found; give a Hugging Face folder or the folder of a run"
        )
    # Importing megatron-core takes seconds, which a Hugging Face folder does not need.
    from megatron_chatflow.convert.to_huggingface import export_checkpoint

    with _exiting_on_sigterm(), scratch_folder("chatflow_export_") as folder:
        logger.info("exporting %s to a temporary folder (set TMPDIR to choose its location)", path)
        export_checkpoint(path, folder / "model", tokenizer=choice)
        yield folder / "model"
