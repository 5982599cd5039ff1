"""Tests that an exported tokenizer gives ten thousand texts the ids that training read.

Real preprocessing writes the texts to `.bin` files. The model trained on them is imported and
exported, and transformers opens the exported folder.
"""

import json
from pathlib import Path

import pytest
import tokenizers
from fuzz_text import fuzz_documents
from made_up_text import made_up_sentences

from megatron_chatflow.convert.from_huggingface import import_huggingface
from megatron_chatflow.convert.to_huggingface import export_checkpoint
from megatron_chatflow.data.indexed import IndexedDataset
from megatron_chatflow.preprocess import PreprocessSettings, preprocess
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer
from megatron_chatflow.tokenizer.extend import extend_tokenizer

KINDS = ("sentencepiece", "extended sentencepiece", "tokenizer.json", "with tokens", "with merges")
NEW = [chr(0x6000 + 13 * k) for k in range(40)]
NUM_TEXTS = 2_000  # of each kind


def make_tokenizer(kind: str, sentencepiece: Path, byte_level: Path, folder: Path) -> Tokenizer:
    if "sentencepiece" in kind:
        old = load_tokenizer(sentencepiece)
        return extend_tokenizer(old, NEW, folder) if "extended" in kind else old
    old = load_tokenizer(byte_level)
    if kind == "tokenizer.json":
        return old
    addition = "added-tokens" if kind == "with tokens" else "merges"
    return extend_tokenizer(old, NEW, folder, addition)


def make_model(tokenizer: Tokenizer, folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=tokenizer.vocab_size, num_attention_heads=2, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_the_export_are_those_of_training(
    kind: str, tiny_sentencepiece_model: Path, byte_level_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    trained_with = make_tokenizer(
        kind, tiny_sentencepiece_model, byte_level_model, tmp_path / "tokenizer"
    )
    texts = made_up_sentences(1000, seed=5) + [
        "".join(NEW[k:] + NEW[:k]) + "。a" for k in range(40)
    ]
    documents = list(fuzz_documents(texts, NUM_TEXTS, seed=KINDS.index(kind)))
    lines = [json.dumps({"text": text}) for text in documents]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    settings = PreprocessSettings(
        inputs=(str(tmp_path / "in.jsonl"),),
        output_prefix=str(tmp_path / "out"),
        tokenizer_model=str(trained_with.model_path),
        num_workers=1,
    )
    preprocess(settings)
    dataset = IndexedDataset(tmp_path / "out_text_document")

    make_model(trained_with, tmp_path / "hf")
    import_huggingface(tmp_path / "hf", tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "export")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert load_tokenizer(tmp_path / "export").fingerprint == trained_with.fingerprint
    # A literal <s> in raw text is text, as it was in training.
    found = theirs(documents, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    position = 0
    for text, ids in zip(documents, found, strict=True):
        if ids:  # empty texts make no document
            assert dataset[position].tolist() == ids, f"{kind}: {text!r}"
            position += 1
    assert position == len(dataset) > 0.9 * NUM_TEXTS


def test_control_tokens_of_a_prompt_are_control_ids(byte_level_model: Path, tmp_path: Path) -> None:
    """The text of a chat template must reach the model with the ids that training stored."""
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(byte_level_model)
    make_model(tokenizer, tmp_path / "hf")
    import_huggingface(tmp_path / "hf", tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "export")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "export")
    ids = theirs("<|im_start|>bana<|im_end|>", add_special_tokens=False)["input_ids"]
    begin, end = (tokenizer.control_id(name) for name in ("<|im_start|>", "<|im_end|>"))
    assert ids == [begin, *tokenizer.encode_continuation("bana"), end]
    raw = tokenizers.Tokenizer.from_file(str(tmp_path / "export" / "tokenizer.json"))
    assert raw.encode("bana", add_special_tokens=False).ids == tokenizer.encode("bana")
