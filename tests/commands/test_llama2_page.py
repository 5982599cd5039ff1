"""Runs the commands of the LLaMA-2 page on made-up text with a tiny model.

Covers the page from the vocabulary to the comparison table. The run itself takes two iterations on
two CPU processes. lm-eval's tasks need a hub and are excluded by name. Commands added to the page
are run automatically.
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

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "examples" / "llama2_7b" / "README.md"
NUM_NEW = 8076
# Parts of the page's commands that identify them.
NAMES = ("tools/extend_vocab.py", "tools/preprocess_data.py", "import", "--dry-run", "paper.yaml")
NAMES += ("export", "verify", "--tasks", "tools/evaluate.py")
# The shape of the tiny model in place of LLaMA-2 7B's, and a run of two iterations.
TINY_SHAPE = ["--num-layers", "1", "--hidden-size", "16", "--ffn-hidden-size", "24"]
TINY_SHAPE += ["--num-attention-heads", "2", "--num-query-groups", "2"]
TINY_RUN = ["--train-samples", "8", "--global-batch-size", "4", "--lr-warmup-iters", "1"]
TINY_RUN += ["--log-interval", "1"]


def commands_of(page: Path) -> list[list[str]]:
    """Returns all commands of the bash blocks before the other sizes, which have their own test."""
    text = page.read_text(encoding="utf-8").split("\n## More nodes")[0]
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    return [shlex.split(line) for line in "".join(blocks).splitlines()]


def make_corpus(folder: Path) -> None:
    """Writes a corpus in which every Chinese character is frequent enough to become a piece.

    It has more characters than are requested, because the tokenizer already has some, and a little
    of every other kind of data.
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
    """Creates a tiny LLaMA in the hub's format, under the name that the page uses."""
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


def run_page(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Runs every command in order.

    Returns the outputs by name, and the names of skipped commands.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"GPUS_PER_NODE": "2", "RDZV_ENDPOINT": "localhost:0", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    shown, left_out = {}, []
    for command in commands_of(PAGE):
        name = next(name for name in NAMES if name in command)
        if name == "--tasks":
            left_out.append(name)
            continue
        command = [sys.executable if part == "python" else part for part in command]
        command += {"--dry-run": TINY_SHAPE, "paper.yaml": TINY_SHAPE + TINY_RUN}.get(name, [])
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr[-3000:]}"
        shown[name] = done.stdout
    return shown, left_out


@pytest.mark.distributed
def test_every_command_of_the_page_runs(tmp_path: Path, tiny_sentencepiece_model: Path) -> None:
    for name in ("tools", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    make_corpus(tmp_path / "corpus")
    make_model(tmp_path / "Llama-2-7b-hf", tiny_sentencepiece_model)
    shown, left_out = run_page(tmp_path)
    assert left_out == ["--tasks"] and shown.keys() == set(NAMES) - {"--tasks"}
    num_new = load_tokenizer(tiny_sentencepiece_model).vocab_size + NUM_NEW
    assert load_tokenizer(tmp_path / "data" / "tokenizer_zh").vocab_size == num_new
    assert len(list((tmp_path / "data").glob("*_document.idx"))) == 8
    assert "7,629 iterations of 512 samples of 2,048 tokens" in shown["--dry-run"]
    assert "1 per copy of the model, 8 copies" in shown["--dry-run"]
    metrics = (tmp_path / "runs" / "llama2_7b_zh" / "metrics.jsonl").read_text().splitlines()
    assert [entry["iteration"] for entry in map(json.loads, metrics) if "lm_loss" in entry] == [
        1,
        2,
    ]
    export = json.loads((tmp_path / "exports" / "llama2_7b_zh" / "config.json").read_text())
    assert export["vocab_size"] == num_new
    assert "zh bits_per_byte" in shown["tools/evaluate.py"]


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
