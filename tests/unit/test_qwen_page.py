"""Tests the page that continues Qwen3: its commands, its jobs and its table of predictions."""

import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from family_tokenizers import make_folder
from tool_calls import call_tool

from megatron_chatflow.checkpoint.files import LATEST, iteration_folder
from megatron_chatflow.checkpoint.store import RunState
from megatron_chatflow.config import load_config, load_config_from_argv
from megatron_chatflow.config.memory import estimate_memory
from megatron_chatflow.convert.shape import LlamaShape
from megatron_chatflow.data.indexed import IndexedDataset
from megatron_chatflow.simulate.layout_search import plan_layout
from megatron_chatflow.simulate.step_time import GPUS
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.training.dry_run import dry_run

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "qwen_zh_to_X"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
VOCAB_SIZE = 151_936
ROWS = 480  # of the tiny model, more than its tokenizer has tokens
SENTENCES = {
    "en": "The river rises slowly after {} days of rain.",
    "zh": "下了{}天的雨，河水慢慢上涨。",
    "th": "แม่น้ำค่อย ๆ สูงขึ้นหลังจากฝนตก {} วัน",
}
# Flags with smaller values for the made-up text.
SMALLER = {"--num-new": "4", "--workers": "1"}


def commands_of(text: str) -> list[list[str]]:
    """Returns the commands of all bash blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    return [shlex.split(line) for line in "".join(blocks).splitlines()]


def jobs() -> list[tuple[int, tuple[str, ...]]]:
    """Returns the number of GPUs and the flags of every job below "Other sizes"."""
    found = []
    for nodes, script, config, *flags in commands_of(PAGE[PAGE.index("## Other sizes") :]):
        assert script == "examples/llama2_7b/train.sh" and ROOT / config == FOLDER / "qwen3_8b.yaml"
        found.append((8 * int(nodes.removeprefix("NNODES=")), tuple(flags)))
    return found


def make_corpus(folder: Path) -> None:
    """Writes a few made-up sentences in the page's three languages, pairs and chats."""
    for part in ("", "_valid"):
        texts = {
            name: [text.format(number) for number in range(200)] for name, text in SENTENCES.items()
        }
        for name, lines in texts.items():
            (folder / f"{name}{part}").mkdir(parents=True)
            documents = "".join(json.dumps({"text": line}) + "\n" for line in lines)
            (folder / f"{name}{part}" / "0.jsonl").write_text(documents, encoding="utf-8")
        for name in ("en", "zh"):
            pairs = zip(texts[name], texts["th"], strict=True)
            lines = [f"{known}\t{new}\n" for known, new in pairs]
            (folder / f"{name}_th{part}.tsv").write_text("".join(lines), encoding="utf-8")
        chats = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            for question, answer in zip(texts["en"], texts["th"], strict=True)
        ]
        lines = [json.dumps({"messages": messages}) + "\n" for messages in chats]
        (folder / f"chat{part}.jsonl").write_text("".join(lines), encoding="utf-8")


def make_model(folder: Path) -> None:
    """Creates a tiny Qwen3 whose tokenizer has fewer tokens than the model has rows."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    make_folder(folder, "qwen3")
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=ROWS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        eos_token_id=load_tokenizer(folder).eos_id,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's working folder after its commands, except training and its dry run."""
    folder = tmp_path_factory.mktemp("qwen")
    make_corpus(folder / "corpus")
    make_model(folder / "Qwen3-8B-Base")
    (folder / "data").mkdir()
    (folder / "runs").mkdir()
    (folder / "runs" / "qwen3_8b_th").symlink_to(folder / "ckpt" / "qwen3_8b")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in commands_of(PAGE[: PAGE.index("## Other sizes")]):
            if command[0] != "python" or command[1] == "-m":
                continue
            name = command[1].removeprefix("tools/")
            arguments = [
                SMALLER.get(before, argument)
                for before, argument in zip(command[1:], command[2:], strict=False)
            ]
            done = call_tool(name, *arguments)
            assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
            (folder / f"{name}.txt").write_text(done.stdout, encoding="utf-8")
    return folder


def test_the_commands_make_data_and_models(workplace: Path) -> None:
    assert len(list((workplace / "data").glob("*_document.idx"))) == 12
    tokenizer = load_tokenizer(workplace / "Qwen3-8B-Base")
    extended = load_tokenizer(workplace / "data" / "tokenizer_th")
    assert extended.vocab_size >= tokenizer.vocab_size + 4  # merges on the way count as well
    thai = SENTENCES["th"]
    assert len(extended.encode(thai)) < len(tokenizer.encode(thai))
    chats = IndexedDataset(workplace / "data" / "chat_messages_document")
    masks = IndexedDataset(workplace / "data" / "chat_messages_loss_mask")
    text, loss = np.asarray(chats[3]), np.asarray(masks[3]).astype(bool)
    question, answer = SENTENCES["en"].format(3), SENTENCES["th"].format(3)
    model = tokenizers.Tokenizer.from_file(str(workplace / "Qwen3-8B-Base" / "tokenizer.json"))
    assert model.decode(text[loss].tolist(), skip_special_tokens=False) == f"{answer}<|im_end|>"
    before = model.decode(text[: int(loss.argmax())].tolist(), skip_special_tokens=False)
    assert before.endswith(f"{question}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    export = json.loads((workplace / "exports/qwen3_8b_th/config.json").read_text())
    assert export["architectures"] == ["Qwen3ForCausalLM"] and export["vocab_size"] == ROWS
    assert "th bits_per_byte" in (workplace / "evaluate.py.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(("num_gpus", "flags"), jobs())
def test_a_job_passes_its_dry_run_and_fits(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, num_gpus: int, flags: tuple[str, ...]
) -> None:
    monkeypatch.chdir(workplace)
    argv = ["--config", str(FOLDER / "qwen3_8b.yaml"), *flags]
    argv += ["--pretrained-checkpoint", str(workplace / f"weights_{'_'.join(flags[1:2])}")]
    argv += [
        "--load",
        str(workplace / "new"),
        "--save",
        str(workplace / "new"),
        "--dry-run",
        "--world-size",
        str(num_gpus),
    ]
    run, given = load_config_from_argv(argv)
    assert run.checkpoint.pretrained_checkpoint is not None
    checkpoint = iteration_folder(Path(run.checkpoint.pretrained_checkpoint), 0)
    if not checkpoint.exists():
        checkpoint.mkdir(parents=True)
        shape = LlamaShape.of(run.model, VOCAB_SIZE)
        state = RunState(0, 0, 0, {}, {}, {}, {}, shape.recorded())
        (checkpoint / "state.json").write_text(json.dumps(asdict(state)))
        (checkpoint.parent / LATEST).write_text("0\n")
    text = dry_run(run, given.world_size)
    assert f"{num_gpus} processes" in text and "RANDOM WEIGHTS" not in text
    memory = estimate_memory(run, VOCAB_SIZE, num_gpus)
    assert memory.total < 72 * 2**30, f"{memory} leaves too little of 80 GB to the libraries"


@pytest.mark.parametrize(("num_gpus", "flags"), jobs())
def test_the_table_shows_the_prediction(num_gpus: int, flags: tuple[str, ...]) -> None:
    config = load_config(FOLDER / "qwen3_8b.yaml", list(flags))
    layout = plan_layout(config, num_gpus, GPUS["h100"], VOCAB_SIZE)
    cells = (
        flags[1] if flags else "qwen3-8b",
        str(num_gpus),
        layout.name,
        f"{layout.memory / 2**30:.1f}",
        f"{layout.tokens_per_second / num_gpus:,.0f}",
        f"{100 * layout.mfu:.1f}",
        f"{8e9 / layout.tokens_per_second / 86400:.2f}",
    )
    row = f"| {' | '.join(cells)} |"
    assert row in PAGE.splitlines(), row
