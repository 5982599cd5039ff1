"""Tests conversion of real megatron-core models: logits against transformers, and round trips."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import run_forked, run_tool

from megatron_chatflow.convert.distributed import DistributedReader
from megatron_chatflow.convert.from_huggingface import import_huggingface
from megatron_chatflow.convert.safetensors import HuggingFaceWeights
from megatron_chatflow.convert.template import TokenizerChoice
from megatron_chatflow.convert.to_huggingface import export_checkpoint
from megatron_chatflow.convert.vocabulary import Resize
from megatron_chatflow.convert.weight_map import RULES
from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.extend import extend_tokenizer

sys.path.insert(0, str(Path(__file__).parent))
from conversion_worker import SHAPE, token_ids  # noqa: E402

ROOT = Path(__file__).parents[2]
GQA = {"num_query_groups": 2}
TIED = {"untie_embeddings_and_output_weights": False}
NO_TOKENIZER = TokenizerChoice(leave_out=True)

# Checkpoint name to model, tensor-parallel and pipeline-parallel size, on two processes.
SAVED: dict[str, tuple[dict[str, Any], int, int]] = {
    "mha": ({}, 1, 1),
    "gqa_tied": ({**GQA, **TIED}, 1, 1),
    "gqa_tp2": (GQA, 2, 1),
    "mha_tied_pp2": (TIED, 1, 2),
    "bf16_tp2": ({**GQA, "hidden_size": 96}, 2, 1),
    # heads of 12 instead of 6 in a model of width 48
    "wide_heads_tp2": ({**GQA, "kv_channels": 12}, 2, 1),
}
# Layouts in which an imported folder is loaded: name to tensor-parallel and pipeline-parallel size.
LOADED = {"dp2": (1, 1), "tp2": (2, 1), "pp2": (1, 2)}
TEXT = "the river rose and the bridge fell into the water of the river "


def run_job(tasks: list[dict[str, Any]], world_size: int) -> None:
    """Runs conversion_worker.py on `world_size` processes."""
    done = run_forked(
        [Path(__file__).with_name("conversion_worker.py"), json.dumps(tasks)],
        num_ranks=world_size,
        environment={"PYTHONWARNINGS": "ignore"},
        timeout=600,
        merge_output=True,
    )
    assert done.returncode == 0, done.stdout


def random_llama(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """Creates a Hugging Face folder with transformers, with weights that are not near 0 or 1."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=SHAPE["vocab_size"],
        hidden_size=SHAPE["hidden_size"],
        intermediate_size=SHAPE["ffn_hidden_size"],
        num_hidden_layers=SHAPE["num_layers"],
        num_attention_heads=SHAPE["num_attention_heads"],
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": SHAPE["rotary_base"]},
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1))
    model.to(dtype).save_pretrained(folder)
    return folder


def resized_model(huggingface: Path, tokenizer_model: Path, root: Path) -> int:
    """Imports the model with a larger vocabulary and more padding. Returns the vocabulary size."""
    folder = shutil.copytree(huggingface, root / "with_tokenizer")
    old = load_tokenizer(tokenizer_model)
    old.save_pretrained(folder)
    new = extend_tokenizer(old, [chr(0x6000 + k) for k in range(101)], root / "extended")
    import_huggingface(folder, root / "resized", resize=Resize(new))
    return new.vocab_size


@pytest.fixture(scope="session")
def huggingface(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates a random grouped-query LLaMA with transformers."""
    return random_llama(tmp_path_factory.mktemp("huggingface") / "llama")


@pytest.fixture(scope="session")
def checkpoints(
    huggingface: Path, tokenizer_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Creates every checkpoint of `SAVED`, imports `huggingface`, and saves the models' logits."""
    root = tmp_path_factory.mktemp("checkpoints")
    tasks = []
    for name, (model, tp, pp) in SAVED.items():
        task = {"do": "save", "folder": str(root / name / "iter_0000001"), "model": model}
        tasks.append({**task, "bf16": "bf16" in name, "tp": tp, "pp": pp})
    import_huggingface(huggingface, root / "imported")
    for tp, pp in LOADED.values():
        task = {"do": "load", "folder": str(root / "imported" / "iter_0000000"), "model": GQA}
        tasks.append({**task, "tp": tp, "pp": pp})
    resized = resized_model(huggingface, tokenizer_model, root)
    task = {"do": "load", "folder": str(root / "resized" / "iter_0000000"), "tp": 2, "pp": 1}
    tasks.append({**task, "model": {**GQA, "vocab_size": resized}})
    for task, name in zip(tasks, [*SAVED, *LOADED, "resized"], strict=True):
        task["logits"] = str(root / f"{name}.pt")
    run_job(tasks, 2)
    for name in SAVED:
        (root / name / "latest_checkpointed_iteration.txt").write_text("1\n")
    return root


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains a SentencePiece model of 301 pieces with LLaMA's control ids."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(TEXT * 20 + "\n" + "今天下了一场大雨\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=301,
        byte_fallback=True,
        hard_vocab_limit=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def with_state(checkpoint: Path, copy: Path, **changes: Any) -> Path:
    """Copies a run folder and changes entries of its state.json."""
    shutil.copytree(checkpoint, copy)
    path = next(copy.glob("iter_*")) / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return copy


def transformers_logits(folder: Path, vocab_size: int = SHAPE["vocab_size"]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, LlamaForCausalLM)
    with torch.no_grad():
        return model(input_ids=token_ids(vocab_size)[None]).logits[0].float()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    weights = HuggingFaceWeights(folder)
    return {name: weights.read(name) for name in weights.files}


def assert_same_tensors(one: Path, other: Path) -> None:
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


def in_order(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """Compares up to fp32 rounding: 24 bits, and sums of at most 96 terms in another order."""
    assert logits.shape == expected.shape == (40, SHAPE["vocab_size"])
    assert expected.abs().max() > 1
    assert (logits - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in SAVED if "bf16" not in name])
def test_exported_logits_equal_the_training_models(
    checkpoints: Path, name: str, tmp_path: Path
) -> None:
    done = export_checkpoint(checkpoints / name, tmp_path / "hf", tokenizer=NO_TOKENIZER)
    in_order(transformers_logits(tmp_path / "hf"), torch.load(checkpoints / f"{name}.pt"))
    assert done.num_bytes == 4 * done.num_parameters
    names = set(tensors_of(tmp_path / "hf"))
    assert ("lm_head.weight" in names) == ("tied" not in name)


@pytest.mark.distributed
def test_dtypes(checkpoints: Path, tmp_path: Path) -> None:
    for dtype, expected in (
        (None, torch.bfloat16),
        ("fp16", torch.float16),
        ("fp32", torch.float32),
    ):
        folder = tmp_path / str(dtype)
        export_checkpoint(checkpoints / "bf16_tp2", folder, dtype=dtype, tokenizer=NO_TOKENIZER)
        assert {tensor.dtype for tensor in tensors_of(folder).values()} == {expected}
        config = json.loads((folder / "config.json").read_text())
        assert f"torch.{config['torch_dtype']}" == str(expected)
    exact = tensors_of(tmp_path / "fp32")
    for name, tensor in tensors_of(tmp_path / "None").items():
        assert torch.equal(tensor.float(), exact[name])


@pytest.mark.distributed
@pytest.mark.parametrize("name", LOADED)
def test_imported_folder_loads_at_any_layout(
    checkpoints: Path, huggingface: Path, name: str
) -> None:
    in_order(torch.load(checkpoints / f"{name}.pt"), transformers_logits(huggingface))


@pytest.mark.distributed
def test_resized_model_under_tensor_parallelism(checkpoints: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoints / "resized", tmp_path / "hf")
    expected = transformers_logits(tmp_path / "hf", vocab_size=402)
    logits = torch.load(checkpoints / "resized.pt")
    assert logits.shape == (40, 402)
    assert (logits - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.distributed
@pytest.mark.parametrize("name", SAVED)
def test_round_trip_is_bit_exact(checkpoints: Path, name: str, tmp_path: Path) -> None:
    export_checkpoint(checkpoints / name, tmp_path / "a", tokenizer=NO_TOKENIZER)
    import_huggingface(tmp_path / "a", tmp_path / "checkpoint")
    export_checkpoint(
        tmp_path / "checkpoint",
        tmp_path / "b",
        tokenizer=NO_TOKENIZER,
        max_shard_bytes=40_000,
    )
    assert (tmp_path / "b" / "model.safetensors.index.json").exists()
    assert_same_tensors(tmp_path / "a", tmp_path / "b")
    one, other = (json.loads((tmp_path / k / "config.json").read_text()) for k in "ab")
    assert one == other


def test_import_then_export_gives_transformers_own_folder(
    huggingface: Path, tmp_path: Path
) -> None:
    import_huggingface(huggingface, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "hf", tokenizer=NO_TOKENIZER)
    assert_same_tensors(huggingface, tmp_path / "hf")


def test_sharded_folders_and_pickled_weights_are_read(huggingface: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(huggingface)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    (tmp_path / "pickled").mkdir()
    shutil.copy(huggingface / "config.json", tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    for name in ("sharded", "pickled"):
        import_huggingface(tmp_path / name, tmp_path / f"{name}_checkpoint")
        export_checkpoint(
            tmp_path / f"{name}_checkpoint", tmp_path / f"{name}_hf", tokenizer=NO_TOKENIZER
        )
        assert_same_tensors(huggingface, tmp_path / f"{name}_hf")


def test_padding_rows_are_zero_and_never_exported(huggingface: Path, tmp_path: Path) -> None:
    import_huggingface(huggingface, tmp_path / "checkpoint", dtype="bf16")
    reader = DistributedReader(tmp_path / "checkpoint" / "iter_0000000")
    for rule in (RULES[0], RULES[-1]):
        rows = reader.read(rule, None)
        assert rows.shape == (384, 48) and rows.dtype == torch.bfloat16
        assert not rows[301:].any() and rows[:301].any(dim=1).all()


@pytest.mark.distributed
def test_tokenizer_and_chat_template_go_with_the_model(
    checkpoints: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    ours = load_tokenizer(tokenizer_model)
    recorded = {"type": "Llama2Tokenizer", "sha256": ours.fingerprint, "vocab_size": 301}
    run = with_state(checkpoints / "mha", tmp_path / "run", tokenizer=recorded)
    export_checkpoint(run, tmp_path / "plain", tokenizer=TokenizerChoice(tokenizer_model))
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").chat_template is None
    choice = TokenizerChoice(tokenizer_model, "chatflow")
    export_checkpoint(run, tmp_path / "hf", tokenizer=choice)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "the water 今天 ☃"
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    messages = [{"role": "user", "content": "the river?"}]
    prompt = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "### Instruction:\nthe river?\n\n### Response:\n"
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert config["eos_token_id"] == generation["eos_token_id"] == ours.eos_id
    # Importing the export records the tokenizer, so the next export finds it.
    import_huggingface(tmp_path / "hf", tmp_path / "again")
    export_checkpoint(tmp_path / "again", tmp_path / "hf2")
    assert (tmp_path / "hf2" / "tokenizer.model").read_bytes() == tokenizer_model.read_bytes()
    with pytest.raises(UserError, match="is not the tokenizer"):
        other = with_state(run, tmp_path / "other", tokenizer={**recorded, "sha256": "0" * 64})
        export_checkpoint(other, tmp_path / "x", tokenizer=TokenizerChoice(tokenizer_model))
    with pytest.raises(UserError, match="no chat template: alpaca"):
        choice = TokenizerChoice(tokenizer_model, "alpaca")
        export_checkpoint(run, tmp_path / "x", tokenizer=choice)


@pytest.mark.distributed
def test_command_line(checkpoints: Path, tmp_path: Path) -> None:
    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return run_tool("convert_checkpoint.py", *arguments)

    checkpoint = checkpoints / "gqa_tp2"
    export_checkpoint(checkpoint, tmp_path / "hf", tokenizer=NO_TOKENIZER)
    done = run("verify", "--hf", tmp_path / "hf", "--checkpoint", checkpoint)
    assert done.returncode == 0, done.stderr
    assert "all 21 tensors are bitwise equal" in done.stdout
    assert "logits: largest difference" in done.stdout and "same model" in done.stdout
    done = run("export", "--checkpoint", checkpoint, "--output", tmp_path / "hf")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "use --overwrite" in done.stderr and "Traceback" not in done.stderr
