"""Tests that the examples' configurations are valid for their numbers of processes."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_run import write_checkpoint_state

from examples.smollm2_zh import demo
from megatron_chatflow.config import load_config, validate_for_world
from megatron_chatflow.config.memory import estimate_memory
from megatron_chatflow.data.indexed import IndexedDatasetWriter
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.extend import extend_tokenizer
from megatron_chatflow.training.dry_run import dry_run
from megatron_chatflow.training.inputs import open_inputs

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "smallest", "largest"), [("7b", 8, 256), ("13b", 8, 256), ("70b", 64, 256)]
)
def test_llama2_layouts_fit_their_gpus(name: str, smallest: int, largest: int) -> None:
    config = load_config(EXAMPLES / "llama2_7b" / f"{name}.yaml")
    for world_size in (smallest, largest):
        validate_for_world(config, world_size)
        memory = estimate_memory(config, 40076, world_size)
        assert memory.total < 72 * 2**30, f"{memory} leaves too little of 80 GB to the libraries"


@pytest.mark.parametrize(
    "name", ["tiny_cpu/foundation", "tiny_cpu/chatflow", "smollm2_zh/chatflow"]
)
def test_the_demos_run_on_two_processes(name: str) -> None:
    validate_for_world(load_config(EXAMPLES / f"{name}.yaml"), 2)


@pytest.mark.parametrize("name", ["staged", "distilled"])
def test_variants_of_smollm2_are_ready_to_train(
    name: str, byte_level_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their YAML and flags pass a dry run on small datasets, with weights that were imported."""
    monkeypatch.chdir(EXAMPLES.parent)
    monkeypatch.setattr(demo, "WORK", tmp_path)
    variant = demo.Variant(name, tmp_path / name)
    old = load_tokenizer(byte_level_model)
    extended = extend_tokenizer(old, ["\u9f8d", "\u9f9c"], variant.tokenizer)
    for source in ("english_text", "chinese_text", "parallel_text", "instruction_messages"):
        variant.tokens.mkdir(exist_ok=True)
        writer = IndexedDatasetWriter(variant.tokens / f"{source}_document", np.uint16)
        for number in range(40):
            writer.add_document(np.arange(600, dtype=np.uint16) * number % old.vocab_size)
        writer.finalize()
    variant.folder.mkdir()
    runs: list[tuple[Path, list[str]]] = []
    monkeypatch.setattr(
        demo, "pretrain", lambda _, path, *flags: runs.append((path, list(map(str, flags))))
    )
    demo.train(variant, demo.FULL)
    [(path, flags)] = runs
    # What `convert_checkpoint.py import` leaves, without the weights.
    scratch = load_config(path)
    scratch = replace(scratch, train=replace(scratch.train, stages=()))
    tokenizer = open_inputs(scratch).state.tokenizer
    tokenizer["new_rows"] = [old.vocab_size, extended.vocab_size]
    write_checkpoint_state(scratch, variant.folder / "imported", tokenizer=tokenizer)
    text = dry_run(load_config(path, flags), 2)
    assert f"starts from the weights of {variant.folder / 'imported'}" in text
    assert "180 iterations of 8 samples of 512 tokens" in text
    if name == "staged":
        [first, second] = re.findall(r"^ *[01] .* (\S+ to \S+)  +(?:new_rows|all) ", text, re.M)
        assert (first, second) == ("1 to 15", "16 to 180")
    assert ("stages of training" in text) == (name == "staged")
