"""The page about LLaMA-2: what prepares the run is taken from it and run, on made-up text.

Vocabulary, weights and tokens, with a tiny model; a command that the page gains there is run.
"""

import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_up_text import made_up_sentences

from megatron_chatflow.config import load_config, validate_for_world
from megatron_chatflow.config.memory import estimate_memory
from megatron_chatflow.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "examples" / "llama2_7b" / "README.md"
NUM_NEW = 8076


def commands_of(page: Path) -> list[list[str]]:
    """Every command of the page's bash blocks, as arguments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [shlex.split(line) for line in "".join(blocks).splitlines()]


def make_corpus(folder: Path) -> None:
    """Every Chinese character often enough to be a piece, and some of everything else.

    There are more than are asked for: the tokenizer has some already.
    """
    han = [chr(0x4E00 + k) for k in range(NUM_NEW + 600)]
    random.Random(0).shuffle(han)
    chinese = ["".join(han[k : k + 100]) for k in range(0, len(han), 100)] * 3
    english = made_up_sentences(3000)[::3]
    chat = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in zip(english, chinese, strict=False)
    ]
    for part in ("", "_valid"):
        for name, texts in (("en", english), ("zh", chinese)):
            (folder / f"{name}{part}").mkdir(parents=True)
            lines = [json.dumps({"text": text}) for text in texts]
            (folder / f"{name}{part}" / "0.jsonl").write_text("\n".join(lines) + "\n")
        pairs = zip(english, chinese, strict=False)
        (folder / f"zh_en{part}.tsv").write_text(
            "".join(f"{en}\t{zh[: len(en)]}\n" for en, zh in pairs), encoding="utf-8"
        )
        (folder / f"chat{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chat))


def make_model(folder: Path, tokenizer_model: Path) -> None:
    """A tiny LLaMA as the hub keeps it, under the name that the page gives it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer(tokenizer_model)
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        num_attention_heads=2,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        **shape,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_the_page_prepares_a_run(tmp_path: Path, tiny_sentencepiece_model: Path) -> None:
    for name in ("tools", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    make_corpus(tmp_path / "corpus")
    make_model(tmp_path / "Llama-2-7b-hf", tiny_sentencepiece_model)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    for command in commands_of(PAGE):
        if "--dry-run" in command:
            break
        command = [sys.executable if part == "python" else part for part in command]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr[-3000:]}"
    else:
        pytest.fail("the page has no dry run")
    num_old = load_tokenizer(tiny_sentencepiece_model).vocab_size
    assert load_tokenizer(tmp_path / "data" / "tokenizer_zh").vocab_size == num_old + NUM_NEW
    prefixes = {path.name for path in (tmp_path / "data").glob("*_document.idx")}
    assert len(prefixes) == 8


@pytest.mark.parametrize("world_size", [8, 64])
def test_the_papers_run_fits_its_gpus(world_size: int) -> None:
    config = load_config(ROOT / "examples" / "llama2_7b" / "paper.yaml")
    validate_for_world(config, world_size)
    memory = estimate_memory(config, 32_000 + NUM_NEW, world_size)
    assert memory.total < 72 * 2**30, f"{memory} leaves too little of 80 GB to the libraries"


def test_the_page_says_what_the_estimate_is() -> None:
    config = load_config(ROOT / "examples" / "llama2_7b" / "paper.yaml")
    memory = estimate_memory(config, 32_000 + NUM_NEW, 8)
    (shown,) = re.findall(r"takes (\d+) GiB by the estimate", PAGE.read_text(encoding="utf-8"))
    assert int(shown) == round(memory.total / 2**30)
