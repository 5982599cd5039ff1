"""Tests bad input to the converter: one clear line for each error, and no partial output."""

import json
import pickle
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_shape import SHAPE

from megatron_chatflow.convert.from_huggingface import import_huggingface
from megatron_chatflow.convert.shape import huggingface_config
from megatron_chatflow.convert.template import TokenizerChoice
from megatron_chatflow.convert.to_huggingface import export_checkpoint
from megatron_chatflow.convert.weight_map import huggingface_shapes
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import new_folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Creates a small Hugging Face folder."""
    folder = tmp_path / "source"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.rand(size, generator=generator)
        for name, size in huggingface_shapes(SHAPE).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = huggingface_config(SHAPE, torch.float32, {})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Path:
    """Imports the folder as a checkpoint."""
    import_huggingface(source, tmp_path / "run")
    return tmp_path / "run"


def change_config(source: Path, **changes: object) -> None:
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(source: Path, drop: str = "", **changes: torch.Tensor) -> None:
    path = source / "model.safetensors"
    tensors = {**load_file(path), **changes}
    tensors.pop(drop, None)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(source: Path, tmp_path: Path, message: str) -> None:
    """Asserts that the import fails with `message` in one line and leaves no files."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as caught:
        import_huggingface(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            "architecture GPT2LMHeadModel is not",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architecture .* is not supported"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (
            {"head_dim": 8},
            r"q_proj.weight has shape \[16, 16\], but \[32, 16\] according to config.json",
        ),
        ({"head_dim": 3}, "the head size 3 is not supported"),
        ({"head_dim": "4"}, "the head size '4' is not supported"),
        ({"num_attention_heads": 5, "head_dim": None}, "do not fit hidden_size 16"),
        ({"num_key_value_heads": 3}, "3 key/value heads do not fit hidden_size 16"),
        ({"hidden_size": None}, "hidden_size is missing"),
        (
            {"vocab_size": 10},
            r"embed_tokens.weight has shape \[9, 16\], but \[10, 16\] according to config.json",
        ),
        ({"num_hidden_layers": 3}, "9 tensors are missing, the first is model.layers.2"),
        ({"num_hidden_layers": 1}, "model.layers.1.* is not a tensor of the model"),
    ],
)
def test_configs_of_other_models(
    source: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    change_config(source, **changes)
    refused(source, tmp_path, message)


def test_tensors_that_do_not_fit(source: Path, tmp_path: Path) -> None:
    change_tensors(source, **{"model.extra.weight": torch.ones(1)})
    refused(source, tmp_path, "model.extra.weight is not a tensor of the model")
    change_tensors(source, drop="model.extra.weight", **{"model.norm.weight": torch.ones(7)})
    refused(source, tmp_path, r"model.norm.weight has shape \[7\]")
    change_tensors(source, **{"model.norm.weight": torch.ones(16, dtype=torch.int8)})
    refused(source, tmp_path, "model.norm.weight is not fp32, bf16 or fp16")
    change_tensors(source, drop="model.norm.weight")
    refused(source, tmp_path, "1 tensors are missing, the first is model.norm.weight")


def test_known_extras_are_passed_over(source: Path, tmp_path: Path) -> None:
    change_tensors(source, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    import_huggingface(source, tmp_path / "a")
    # A tied model may store its output layer if it equals the embedding. Otherwise it is refused.
    embedding = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    change_config(source, tie_word_embeddings=True)
    refused(source, tmp_path, "lm_head.weight is not a tensor")
    change_tensors(source, **{"lm_head.weight": embedding.clone()})
    import_huggingface(source, tmp_path / "b")
    for other in (
        embedding.bfloat16(),
        embedding[0].clone(),
        torch.tensor(1.0),
        torch.ones(2, 2, 2),
    ):
        change_tensors(source, **{"lm_head.weight": other})
        refused(source, tmp_path, "lm_head.weight is not a tensor")
    change_tensors(source, **{"lm_head.weight": torch.ones(9, 16, dtype=torch.int8)})
    refused(source, tmp_path, "lm_head.weight is not fp32, bf16 or fp16")


def test_damaged_files(source: Path, tmp_path: Path) -> None:
    path = source / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    refused(source, tmp_path, "model.safetensors: is damaged")
    path.write_bytes(b"not safetensors")
    refused(source, tmp_path, "model.safetensors: is damaged")
    path.unlink()
    refused(source, tmp_path, "has no model.safetensors")
    index = source / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"lm_head.weight": "model-1.safetensors"}}')
    refused(source, tmp_path, "model-1.safetensors: is missing")
    index.write_text('{"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}')
    refused(source, tmp_path, "is missing")
    index.write_text("{")
    refused(source, tmp_path, "index.json: is damaged")
    (source / "config.json").write_text("{")
    refused(source, tmp_path, "config.json: is damaged")
    (source / "config.json").unlink()
    refused(source, tmp_path, "has no config.json")
    refused(tmp_path / "none", tmp_path, "folder not found")


class _Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("harmed"),))  # type: ignore[return-value]


def test_pickles_are_never_executed(
    source: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (source / "model.safetensors").unlink()
    torch.save({"lm_head.weight": _Harmful()}, source / "pytorch_model.bin")
    refused(source, tmp_path, "cannot be loaded safely")
    (run / "iter_0000000" / ".metadata").write_bytes(pickle.dumps(_Harmful()))
    with pytest.raises(UserError, match=r"\.metadata was changed after tensor_index\.json was"):
        export_checkpoint(run, tmp_path / "hf")
    (run / "iter_0000000" / "tensor_index.json").unlink()
    with pytest.raises(UserError, match="is not allowed in an index"):
        export_checkpoint(run, tmp_path / "hf")
    assert not (tmp_path / "harmed").exists()


def test_damaged_checkpoints(run: Path, tmp_path: Path) -> None:
    checkpoint = run / "iter_0000000"

    def refused_export(message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            export_checkpoint(run, tmp_path / "hf", tokenizer=TokenizerChoice(leave_out=True))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "hf").exists()

    shard = checkpoint / "__0_0.distcp"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refused_export("__0_0.distcp: is damaged at ")
    shard.unlink()
    refused_export("__0_0.distcp: is missing")
    shard.write_bytes(whole)
    state = json.loads((checkpoint / "state.json").read_text())
    for name, value, message in (
        (
            "hidden_size",
            32,
            r"embedding.word_embeddings.weight has shape \[128, 16\], but the model",
        ),
        ("vocab_size", 129, r"embedding.word_embeddings.weight has shape \[128, 16\]"),
        ("num_layers", 3, "has only 2 layers, but layer 2 was requested"),
        ("norm_epsilon", None, "model.norm_epsilon is missing"),
    ):
        changed = {**state, "model": {**state["model"], name: value}}
        (checkpoint / "state.json").write_text(json.dumps(changed))
        (checkpoint / "config.yaml").unlink(missing_ok=True)
        refused_export(message)
    (checkpoint / "state.json").unlink()
    refused_export("is not a checkpoint")
    (checkpoint / ".metadata").unlink()
    (checkpoint / "state.json").write_text(json.dumps(state))
    refused_export("no .metadata")
    shutil.rmtree(run)
    refused_export("contains no checkpoint")


def test_missing_tokenizer_is_named(run: Path, tmp_path: Path) -> None:
    path = run / "iter_0000000" / "config.yaml"
    path.write_text(path.read_text() + "tokenizer: {tokenizer_model: /nowhere/tokenizer.model}\n")
    with pytest.raises(UserError, match="/nowhere/tokenizer.model: the run's tokenizer is missing"):
        export_checkpoint(run, tmp_path / "hf")
    export_checkpoint(run, tmp_path / "hf", tokenizer=TokenizerChoice(leave_out=True))


def test_tokenizer_larger_than_the_embedding(source: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    vocabulary = {piece: number for number, piece in enumerate("abcdefghijk")}
    Tokenizer(models.WordLevel(vocabulary, unk_token="a")).save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text('{"eos_token": "b"}')
    refused(source, tmp_path, "the tokenizer has 11 tokens, but the embedding only 9 rows")


def test_outputs_are_not_replaced_unasked(source: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use --overwrite"):
        import_huggingface(source, run)
    import_huggingface(source, run, overwrite=True)
    with pytest.raises(UserError, match="has no .*, so --overwrite does not replace it"):
        import_huggingface(source, source, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        export_checkpoint(run, source / "config.json", overwrite=True)
    export_checkpoint(run, tmp_path / "hf")
    (tmp_path / "hf" / "old").write_text("")
    export_checkpoint(run, tmp_path / "hf", overwrite=True)
    assert not (tmp_path / "hf" / "old").exists()
    (tmp_path / "empty").mkdir()
    export_checkpoint(run, tmp_path / "empty")
    hidden = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert hidden == []


@contextmanager
def small_files_only() -> Iterator[None]:
    """Makes writes of files larger than 5,000 bytes fail, as on a full disk.

    The limit applies only inside the block: pytest writes its own output, perhaps to a file, right
    after the body of a test and before its fixtures end.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_leaves_nothing(source: Path, run: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    with (
        small_files_only(),
        pytest.raises(UserError, match=r"hf: cannot be written \(File too large"),
    ):
        export_checkpoint(run, tmp_path / "hf")
    with (
        small_files_only(),
        pytest.raises(UserError, match=r"run: cannot be written \(File too large"),
    ):
        import_huggingface(source, run, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_too_small_a_disk_is_noticed_before(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="needs 1000000000.00 GB"),
        new_folder(tmp_path / "x", overwrite=False, mark="m", num_bytes=10**18),
    ):
        raise AssertionError("the block must not begin")
