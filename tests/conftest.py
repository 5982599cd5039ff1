"""Settings and fixtures that the whole test suite shares.

The fixtures provide tiny tokenizers and a tiny training run. Their text consists of random
syllables and characters, so it is free of third-party material.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import settings

# Disable hypothesis' deadline: on shared machines the duration of an example means nothing.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# A shell starts background jobs with Ctrl-C ignored. Restore the default, because the programs that
# tests interrupt would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

sys.path.insert(0, str(Path(__file__).parent))
# For `import benchmarks`. Appended last, because names in tools/ such as `evaluate` are also
# packages.
sys.path.append(str(Path(__file__).parents[1] / "tools"))

from made_up_text import made_up_sentences  # noqa: E402  (the path is set just above)
from object_store import ObjectStore  # noqa: E402
from tiny_run import TinyRun, make_tiny_run  # noqa: E402


def pytest_sessionstart() -> None:
    """Fails if a run under the sanitizers would test the compiled modules of the working tree."""
    if (folder := os.environ.get("SANITIZED_LIB")) is not None:
        from megatron_chatflow.blend import _native

        assert _native.__file__.startswith(folder), f"{_native.__file__} is not in {folder}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the flags that set the size of tests/unit/tokenizer/test_fuzz_ids.py."""
    add = parser.addoption
    add("--fuzz-documents", type=int, default=3000, help="documents a model; the full run: 100000")
    add("--fuzz-corpus", help="folder of *.train.jsonl that documents are cut from")
    add("--fuzz-model", action="append", default=[], help="further model or tokenizer.json")


@pytest.fixture(scope="session")
def tiny_sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains a byte-fallback BPE model of 512 pieces with LLaMA's ids.

    unk, bos and eos are 0, 1 and 2.
    """
    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(made_up_sentences(600)),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=512,
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def byte_level_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains a GPT-2-like byte-level BPE `tokenizer.json` with control tokens."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(made_up_sentences(600), trainer)
    path = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    model.save(str(path))
    return path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Creates a run that the real entry point trains within seconds."""
    return make_tiny_run(tmp_path_factory.mktemp("tiny_run"))


@pytest.fixture(scope="session")
def random_llama(tiny_sentencepiece_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates a LLaMA with the tiny tokenizer, the chatflow template and a context of 96 tokens.

    Its weights are far from 0.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_chatflow.preprocess.templates import JINJA_TEMPLATES
    from megatron_chatflow.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tiny_sentencepiece_model)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=96,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[:259] = 0  # control ids and bytes, which rarely form characters
    folder = tmp_path_factory.mktemp("random_llama") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder, JINJA_TEMPLATES["chatflow"])
    return folder


@pytest.fixture(scope="session")
def _object_store_server() -> Iterator[ObjectStore]:
    store = ObjectStore()
    yield store
    store.close()


@pytest.fixture
def object_store(
    _object_store_server: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ObjectStore:
    """An empty S3 bucket on the loopback, which ``s3://corpora/`` names, and a fresh cache."""
    import fsspec
    from s3fs import S3FileSystem

    from megatron_chatflow import remote

    for name, value in _object_store_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    fsspec.filesystem("s3").clear_instance_cache()
    _object_store_server.reset()
    return _object_store_server
