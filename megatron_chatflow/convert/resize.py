"""Converts a checkpoint to one with a larger vocabulary.

The checkpoint may have any parallel layout. The result is a run's folder with iteration 0 that
holds the same weights and rows for the new pieces, from which ``--load CKPT --finetune`` starts.
One process converts the model, with one tensor in memory at a time, except while rows of new
tokens are distilled.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_chatflow.checkpoint.files import LATEST
from megatron_chatflow.convert.distill import with_fitted_rows
from megatron_chatflow.convert.distributed import DistributedReader
from megatron_chatflow.convert.from_huggingface import stored_chunks, write_checkpoint
from megatron_chatflow.convert.shape import shape_of_checkpoint, trained_shape
from megatron_chatflow.convert.template import TokenizerChoice, files_of_checkpoint
from megatron_chatflow.convert.to_huggingface import (
    Converted,
    check_shapes,
    find_checkpoint,
    read_weight,
    run_tokenizer,
)
from megatron_chatflow.convert.vocabulary import Resize, grow_tensor, vocabulary_growth
from megatron_chatflow.convert.weight_map import WeightRule, huggingface_shapes, placements
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import check_new_folder, new_folder
from megatron_chatflow.tokenizer.small_files import replace_tokenizer

_ADVICE = "give the run's tokenizer with --old-tokenizer-model"


def resize_checkpoint(
    checkpoint: Path,
    output: Path,
    resize: Resize,
    *,
    old_tokenizer: Path | None = None,
    overwrite: bool = False,
) -> Converted:
    """Writes a checkpoint's weights with rows for new pieces.

    Args:
        checkpoint: A run's folder, or one of its ``iter_`` folders.
        output: The new run's folder, which appears when it is complete.
        resize: The larger vocabulary.
        old_tokenizer: The run's tokenizer; None uses the configuration's path.
        overwrite: Whether an existing checkpoint folder of that name is replaced.

    Raises:
        UserError: The checkpoint is damaged, the tokenizer does not extend the run's, or the new
            checkpoint cannot be written.
    """
    check_new_folder(output, overwrite=overwrite, mark=LATEST)
    checkpoint = find_checkpoint(checkpoint)
    shape = shape_of_checkpoint(checkpoint)
    reader = DistributedReader(checkpoint)
    check_shapes(reader, shape)
    old = run_tokenizer(checkpoint, TokenizerChoice(model=old_tokenizer, advice=_ADVICE))
    if old is None:
        raise UserError(
            f"{checkpoint}: does not record a tokenizer; give the run's tokenizer with "
            "--old-tokenizer-model"
        )
    files = replace_tokenizer(files_of_checkpoint(checkpoint, old), resize.tokenizer)
    growth = vocabulary_growth(old, resize.tokenizer, shape.vocab_size)
    if resize.init == "distill":
        weights = dict(
            named
            for placement in placements(shape)
            for named in read_weight(reader, shape, placement)
        )
        resize = with_fitted_rows(weights, trained_shape(checkpoint), old, growth, resize)
    grown = replace(shape, vocab_size=growth.num_rows)
    target = reader.dtype(*placements(shape)[0])
    bar = tqdm(total=len(placements(shape)), unit="tensor", desc="resize", disable=None)

    def make(rule: WeightRule, layer: int | None) -> torch.Tensor:
        bar.update()
        whole = reader.read(rule, layer)
        if rule.has_vocabulary_rows:
            whole = whole[: shape.vocab_size]
        return grow_tensor(rule.parts[0].name, whole, growth, resize)

    chunks = [
        chunk
        for rule, layer in placements(grown)
        for chunk in stored_chunks(
            rule, layer, grown, target, [(rule.shape(grown)[0], partial(make, rule, layer))]
        )
    ]
    num_parameters = sum(torch.Size(size).numel() for size in huggingface_shapes(grown).values())
    num_bytes = num_parameters * target.itemsize
    with new_folder(output, overwrite=overwrite, mark=LATEST, num_bytes=num_bytes) as folder:
        write_checkpoint(folder, chunks, grown, resize.tokenizer, files, growth.new_rows)
    return Converted(output, len(huggingface_shapes(grown)), num_bytes, num_parameters)
