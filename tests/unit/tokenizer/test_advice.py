"""Tests the advice on whether to extend a vocabulary."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from new_language import NEW, new_sentences
from tool_calls import call_tool

from megatron_chatflow.config import ModelConfig
from megatron_chatflow.config.shape import flops_per_token
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer
from megatron_chatflow.tokenizer.advice import HALF_LIFE, Fertility, cost_of_extension
from megatron_chatflow.tokenizer.extend import extend_tokenizer

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    max_position_embeddings=128,
    vocab_size=512,
)


@pytest.fixture(scope="module")
def old(tiny_sentencepiece_model: Path) -> Tokenizer:
    return load_tokenizer(tiny_sentencepiece_model)


@pytest.fixture(scope="module")
def new(old: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return extend_tokenizer(old, NEW, tmp_path_factory.mktemp("extended"))


def test_fertility_counts_tokens_of_both(old: Tokenizer, new: Tokenizer) -> None:
    texts = ["ab", NEW[0] + NEW[1]]
    found = Fertility.of(old, new, texts)
    assert found.num_characters == 4 and found.num_bytes == 8
    assert found.num_old_tokens == sum(len(old.encode(text)) for text in texts)
    assert found.num_new_tokens == found.num_old_tokens - 4
    assert found.num_added == 2


def test_break_even_by_hand(old: Tokenizer, new: Tokenizer) -> None:
    fertility = Fertility(1000, 3000, num_old_tokens=3000, num_new_tokens=1000, num_added=500)
    cost = cost_of_extension(MODEL, 128, old, new, fertility, start_gap=0.5)
    tied = replace(MODEL, untie_embeddings_and_output_weights=False)
    before, after = 3 * flops_per_token(tied, 512, 128), flops_per_token(tied, 536, 128)
    assert cost.old_flops_per_character == before and cost.new_flops_per_character == after
    assert cost.reads_per_token == pytest.approx(9 * HALF_LIFE)
    # 24 new tokens, of which every second token is one.
    assert cost.catch_up_tokens == pytest.approx(9 * HALF_LIFE * 24 * 2)
    assert cost.break_even_tokens is not None and cost.catch_up_tokens is not None
    # At the break-even point both models have read equally much that was new to them.
    same_computation = cost.break_even_tokens * after / before
    assert cost.break_even_tokens - cost.catch_up_tokens == pytest.approx(same_computation)


def test_an_extension_that_saves_nothing_never_pays(old: Tokenizer, new: Tokenizer) -> None:
    same = Fertility(1000, 1000, num_old_tokens=300, num_new_tokens=300, num_added=1)
    assert cost_of_extension(MODEL, 128, old, new, same, 1.0).break_even_tokens is None
    without = Fertility(1000, 1000, num_old_tokens=300, num_new_tokens=300, num_added=0)
    assert cost_of_extension(MODEL, 128, old, new, without, 1.0).catch_up_tokens is None


def test_command_prints_and_writes_the_advice(
    tiny_sentencepiece_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "zh.txt").write_text("\n".join(new_sentences(40, seed=1)), encoding="utf-8")
    (tmp_path / "model").mkdir()
    config = {
        **{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 512},
        **{"intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2},
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    flags = [
        *("--tokenizer-model", tiny_sentencepiece_model, "--corpus", tmp_path / "zh.txt"),
        *("--num-new", 20, "--output-dir", tmp_path / "out", "--report", tmp_path / "report.json"),
    ]
    done = call_tool("extend_vocab.py", *flags, "--model", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    assert "MFLOPs/character" in done.stdout and "break-even tokens" in done.stdout
    (text,) = json.loads((tmp_path / "report.json").read_text())["texts"].values()
    assert text["num_new_tokens"] < text["num_old_tokens"] and text["break_even_tokens"] > 0
    done = call_tool("extend_vocab.py", *flags, "--overwrite")  # no model beside the tokenizer
    assert "tokens/character" in done.stdout and "MFLOPs" not in done.stdout
    done = call_tool("extend_vocab.py", *flags, "--overwrite", "--start-gap", "nan")
    assert done.returncode == 2 and "--start-gap" in done.stderr
    done = call_tool("extend_vocab.py", *flags, "--overwrite", "--model", tmp_path)
    assert done.returncode == 2 and "config.json" in done.stderr
