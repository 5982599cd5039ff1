"""Tests vocabulary growth of a trained model, both when its weights load and when a run resumes.

The real entry point trains one iteration with a learning rate too small to change any weight,
validates and saves. The export is compared with the original model through transformers.
"""

from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
import yaml
from made_up_text import made_up_sentences
from new_language import NEW, SHAPE, new_sentences, train_model

from megatron_chatflow.checkpoint.files import resolve_checkpoint
from megatron_chatflow.checkpoint.store import RunState
from megatron_chatflow.convert.safetensors import HuggingFaceWeights
from megatron_chatflow.convert.to_huggingface import export_checkpoint
from megatron_chatflow.data.indexed import IndexedDatasetWriter
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer
from megatron_chatflow.tokenizer.extend import extend_tokenizer

MODEL = {
    "num_layers": SHAPE["num_hidden_layers"],
    "hidden_size": SHAPE["hidden_size"],
    "ffn_hidden_size": SHAPE["intermediate_size"],
    "num_attention_heads": SHAPE["num_attention_heads"],
    "num_query_groups": SHAPE["num_key_value_heads"],
    "max_position_embeddings": SHAPE["max_position_embeddings"],
    "norm_epsilon": 1e-6,
}
BEGINNINGS = ("load_hf", "finetune", "resume")
INITS = ("mean-of-pieces", "normal")
NO_STEP = ["--lr", "1e-30", "--min-lr", "1e-30", "--weight-decay", "0", "--eval-interval", "1"]


def write_data(prefix: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    writer = IndexedDatasetWriter(prefix, np.uint16)
    for text in texts:
        writer.add_document(np.array([*tokenizer.encode(text), tokenizer.eos_id], np.uint16))
    writer.finalize()


def write_config(folder: Path, name: str, tokenizer: Tokenizer) -> Path:
    """Writes the configuration of a run on the old text and the new language with a tokenizer."""
    write_data(folder / f"{name}_old", tokenizer, made_up_sentences(300))
    write_data(folder / f"{name}_new", tokenizer, new_sentences(300, seed=99))
    values = {
        "model": MODEL,
        "tokenizer": {"tokenizer_model": str(tokenizer.model_path)},
        "data": {
            "seq_length": 64,
            "holdout_every": 4,
            "sources": {
                source: {"paths": [str(folder / f"{name}_{source}")]} for source in ("old", "new")
            },
            "schedule": {"knots": [{"at": 0, "weights": {"old": 1, "new": 1}}]},
        },
        "train": {"micro_batch_size": 2, "global_batch_size": 4, "bf16": False, "eval_iters": 4},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def tokenizers(
    tiny_sentencepiece_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Tokenizer]:
    old = load_tokenizer(tiny_sentencepiece_model)
    return old, extend_tokenizer(old, NEW, tmp_path_factory.mktemp("grown") / "tokenizer")


@pytest.fixture(scope="module")
def runs(tokenizers: tuple[Tokenizer, Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates the trained model's run, and one run per starting point and row initialization."""
    folder = tmp_path_factory.mktemp("growth")
    old, new = tokenizers
    train_model(old, folder / "hf")
    start = ["--config", write_config(folder, "before", old), "--load-hf", folder / "hf", *NO_STEP]
    grown = ["--config", write_config(folder, "after", new), *NO_STEP, "--embedding-init"]
    tasks: list[list[object]] = [[*start, "--train-iters", 1, "--save", folder / "start"]]
    for init in INITS:
        for begin in BEGINNINGS:
            place = ["--load-hf", folder / "hf"] if begin == "load_hf" else []
            place = place or ["--load", folder / "start"]
            place += ["--finetune"] if begin == "finetune" else []
            length = ["--train-iters", 2 if begin == "resume" else 1]
            save = ["--save", folder / f"{begin}_{init}"]
            tasks.append([*grown, init, *place, *length, *save])
    staged = yaml.safe_load((folder / "after.yaml").read_text(encoding="utf-8"))
    staged["train"] |= {"train_iters": 2, "stages": [{"at": 0, "trainable": ["new_rows"]}]}
    (folder / "staged.yaml").write_text(yaml.safe_dump(staged))
    rows = ["--config", folder / "staged.yaml", "--lr", "1e-2", "--save", folder / "staged"]
    tasks += [
        [*rows, "--load-hf", folder / "hf", "--embedding-init", "mean", "--exit-interval", 1],
        [*rows, "--load", folder / "staged"],
    ]
    jobs.run_layouts(1, tasks, folder)  # type: ignore[arg-type]
    return folder


def logits(folder: Path, ids: list[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0]


@pytest.mark.distributed
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("begin", BEGINNINGS)
def test_old_text_gives_the_same_bits(
    runs: Path, tokenizers: tuple[Tokenizer, Tokenizer], begin: str, init: str, tmp_path: Path
) -> None:
    export_checkpoint(runs / f"{begin}_{init}", tmp_path / "hf")
    old, new = tokenizers
    text = " ".join(made_up_sentences(2))
    ids = new.encode(text)
    assert ids == old.encode(text)
    before, after = logits(runs / "hf", ids), logits(tmp_path / "hf", ids)
    assert after.shape[1] == new.vocab_size == old.vocab_size + len(NEW)
    assert torch.equal(after[:, : old.vocab_size], before[:, : old.vocab_size])


@pytest.mark.distributed
def test_a_stage_trains_the_new_rows(
    runs: Path, tokenizers: tuple[Tokenizer, Tokenizer], tmp_path: Path
) -> None:
    old, new = tokenizers
    for name in (*(f"{begin}_normal" for begin in BEGINNINGS), "staged"):
        checkpoint = resolve_checkpoint(runs / name)
        assert checkpoint is not None
        recorded = RunState.read(checkpoint).tokenizer["new_rows"]
        assert recorded == [old.vocab_size, new.vocab_size]
    export_checkpoint(runs / "staged", tmp_path / "hf")
    before, after = HuggingFaceWeights(runs / "hf"), HuggingFaceWeights(tmp_path / "hf")
    for name in after.files:
        kept, old_values = after.read(name), before.read(name)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert kept[old.vocab_size :].std(dim=0).min() > 0, "they began as the same mean"
            # The rows of the original model behind its tokens are new tokens' now.
            kept, old_values = kept[: old.vocab_size], old_values[: old.vocab_size]
        assert torch.equal(kept, old_values), name


@pytest.mark.distributed
@pytest.mark.parametrize("begin", BEGINNINGS)
def test_mean_of_pieces_begins_below_normal(runs: Path, begin: str) -> None:
    def first(name: str) -> dict[str, float]:
        _, validations = jobs.read_metrics(runs / name)
        return {k: v["bits_per_byte"] for k, v in validations[0]["validation"].items()}

    before = first("start")
    mean, normal = (first(f"{begin}_{init}") for init in INITS)
    assert mean["new"] < 0.9 * normal["new"]
    assert before["new"] < 0.6 * before["old"], "the model had learnt the new language"
    # The new pieces take some probability from the old text. Nothing else changes for it.
    assert mean["old"] == pytest.approx(before["old"], rel=0.1)
