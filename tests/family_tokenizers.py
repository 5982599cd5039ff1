"""Small tokenizers with the splits and special tokens of LLaMA 3 and Qwen."""

import json
from pathlib import Path

import tokenizers
from made_up_text import made_up_sentences

from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_TEXT = ("<tool_call>", "</tool_call>", "<think>", "</think>")  # tokens that are not special


def make_folder(folder: Path, family: str) -> Tokenizer:
    """Trains a byte-level model with the split of a family, whose added tokens follow the model."""
    is_llama = family == "llama3"
    model = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=is_llama))
    split = tokenizers.Regex(SPLIT % (r"\p{N}{1,3}" if is_llama else r"\p{N}"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(split, "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([*made_up_sentences(100), "system user assistant 123 漢字"], trainer)
    if is_llama:
        model.add_special_tokens([*LLAMA3, "<|eot_id|>"])
        bos = (LLAMA3[0], model.token_to_id(LLAMA3[0]))
        model.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{LLAMA3[0]} $A", special_tokens=[bos]
        )
    else:
        model.normalizer = tokenizers.normalizers.NFC()
        model.add_special_tokens(list(QWEN))
        model.add_tokens(list(QWEN_TEXT))
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast" if is_llama else "Qwen2Tokenizer",
        "bos_token": LLAMA3[0] if is_llama else None,
        "eos_token": "<|eot_id|>" if is_llama else "<|im_end|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)
