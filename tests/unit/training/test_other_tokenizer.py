"""Tests that a tokenizer of the same size but with other pieces is refused for existing weights."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2
from tiny_run import VOCAB_SIZE, TinyRun, made_up_sentences, write_checkpoint_state
from tiny_shape import SHAPE_OF_TINY_RUN

from megatron_chatflow.convert.from_huggingface import import_huggingface
from megatron_chatflow.convert.shape import huggingface_config
from megatron_chatflow.convert.template import TokenizerChoice
from megatron_chatflow.convert.to_huggingface import export_checkpoint
from megatron_chatflow.convert.weight_map import huggingface_shapes
from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer
from megatron_chatflow.tokenizer.extend import extend_tokenizer
from megatron_chatflow.training.inputs import open_inputs


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Trains a tokenizer with as many pieces as the run's, on other text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text.upper() for text in made_up_sentences(400, seed=8)),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("other") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def weights(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves the tiny run's model as a Hugging Face folder with tokenizer and as a checkpoint."""
    folder = tmp_path_factory.mktemp("weights")
    shape = SHAPE_OF_TINY_RUN
    tokenizer = load_tokenizer(tiny_run.tokenizer_model)
    tokenizer.save_pretrained(folder / "hf")
    tensors = {name: torch.ones(size) for name, size in huggingface_shapes(shape).items()}
    save_file(tensors, folder / "hf" / "model.safetensors", metadata={"format": "pt"})
    config = huggingface_config(shape, torch.float32, {})
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    import_huggingface(folder / "hf", folder / "run")
    return folder


def beginnings(weights: Path) -> list[dict[str, object]]:
    return [
        {"checkpoint__load": str(weights / "run"), "checkpoint__finetune": True},
        {"checkpoint__pretrained_checkpoint": str(weights / "run")},
        {"checkpoint__load_hf": str(weights / "hf")},
    ]


def test_weights_are_refused_by_the_first_piece_that_differs(
    make_config, weights: Path, other: Tokenizer
) -> None:
    for begin in beginnings(weights):
        open_inputs(make_config(**begin))
        with pytest.raises(UserError, match=r"id \d+ is '.*', but '.*' in "):
            open_inputs(make_config(tokenizer__tokenizer_model=str(other.model_path), **begin))


def test_the_same_pieces_in_another_file_are_welcome(
    make_config, weights: Path, tiny_run: TinyRun, tmp_path: Path
) -> None:
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(tiny_run.tokenizer_model.read_bytes())
    model.trainer_spec.model_prefix = "of another name"
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    ours = load_tokenizer(path)
    assert ours.fingerprint != load_tokenizer(weights / "hf").fingerprint
    for begin in beginnings(weights):
        inputs = open_inputs(make_config(tokenizer__tokenizer_model=str(path), **begin))
        assert inputs.tokenizer.fingerprint == ours.fingerprint


def test_more_pieces_need_a_beginning_even_where_rows_are_spare(
    make_config, weights: Path, tiny_run: TinyRun, tmp_path: Path
) -> None:
    old = load_tokenizer(tiny_run.tokenizer_model)
    larger = extend_tokenizer(old, ["\u9f8d"], tmp_path / "larger")
    for begin in beginnings(weights):
        with pytest.raises(UserError, match="--embedding-init"):
            open_inputs(make_config(tokenizer__tokenizer_model=str(larger.model_path), **begin))


def test_weights_that_were_grown_elsewhere_need_no_beginning(
    make_config, weights: Path, tiny_run: TinyRun, tmp_path: Path
) -> None:
    """The folder has the larger tokenizer or none; the one of before names the new rows."""
    old = load_tokenizer(tiny_run.tokenizer_model)
    larger = extend_tokenizer(old, ["\u9f8d"], tmp_path / "larger")
    new_rows = [old.vocab_size, larger.vocab_size]
    for name, has_tokenizer in (("with", True), ("without", False)):
        folder = tmp_path / name
        folder.mkdir()
        if has_tokenizer:
            larger.save_pretrained(folder)
        shape = replace(SHAPE_OF_TINY_RUN, vocab_size=larger.vocab_size)
        tensors = {key: torch.ones(size) for key, size in huggingface_shapes(shape).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = huggingface_config(shape, torch.float32, {})
        (folder / "config.json").write_text(json.dumps(config))
        changes = {
            "tokenizer__tokenizer_model": str(larger.model_path),
            "tokenizer__old_tokenizer_model": str(tiny_run.tokenizer_model),
            "train__stages": [{"at": 0, "trainable": ["new_rows"]}],
        }
        inputs = open_inputs(make_config(checkpoint__load_hf=str(folder), **changes))
        assert inputs.grown is None and inputs.state.tokenizer["new_rows"] == new_rows
    # Weights with the smaller tokenizer have no rows of these tokens.
    for begin in beginnings(weights):
        with pytest.raises(UserError, match="--embedding-init"):
            open_inputs(make_config(**begin, **changes))


def test_the_same_command_continues_a_run_that_has_grown(
    make_config, weights: Path, tiny_run: TinyRun, tmp_path: Path
) -> None:
    """The checkpoint then has the tokenizer that extends the one that the command names."""
    old = load_tokenizer(tiny_run.tokenizer_model)
    larger = extend_tokenizer(old, ["\u9f8d", "\u9f9c"], tmp_path / "larger")
    folder = tmp_path / "run"
    new_rows = [old.vocab_size, larger.vocab_size]
    changes = {
        "tokenizer__tokenizer_model": str(larger.model_path),
        "tokenizer__old_tokenizer_model": str(tiny_run.tokenizer_model),
        "checkpoint__embedding_init": "mean-of-pieces",
        "checkpoint__load_hf": str(weights / "hf"),
        "checkpoint__load": str(folder),
        "train__stages": [{"at": 0, "trainable": ["new_rows"]}],
    }
    config = make_config(**changes)
    begun = open_inputs(config)
    assert begun.grown is not None and begun.state.tokenizer["new_rows"] == new_rows
    write_checkpoint_state(config, folder, stages=begun.stages.record([(0, 0)]))
    resumed = open_inputs(config)
    assert resumed.grown is None and resumed.resumed is not None
    assert resumed.state.tokenizer["new_rows"] == new_rows
    # A tokenizer that is named explicitly counts more than what the checkpoint recorded.
    middle = extend_tokenizer(old, ["\u9f8d"], tmp_path / "middle")
    for extra in ({}, {"tokenizer__old_tokenizer_model": str(middle.model_path)}):
        begin = {"checkpoint__load_hf": None, "checkpoint__finetune": True}
        inputs = open_inputs(make_config(**{**changes, **begin, **extra}))
        first = middle.vocab_size if extra else old.vocab_size
        assert inputs.state.tokenizer["new_rows"] == [first, larger.vocab_size]


def test_an_export_takes_the_runs_own(weights: Path, other: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not the tokenizer that .* was trained with"):
        export_checkpoint(
            weights / "run", tmp_path / "hf", tokenizer=TokenizerChoice(other.model_path)
        )
    assert not (tmp_path / "hf").exists()


def test_training_finds_a_tokenizer_as_the_tools_do(
    make_config, tiny_run: TinyRun, byte_level_model: Path, tmp_path: Path
) -> None:
    """Without a type, a folder with only a tokenizer.json is treated as one of that format."""
    folder = tmp_path / "json_alone"
    enough = [chr(0x6000 + k) for k in range(VOCAB_SIZE)]  # for the ids in the data
    extend_tokenizer(load_tokenizer(byte_level_model), enough, folder)
    for path in (folder, folder / "tokenizer.json", tiny_run.tokenizer_model):
        inputs = open_inputs(make_config(tokenizer__tokenizer_model=str(path)))
        kind = "HuggingFaceTokenizer" if path != tiny_run.tokenizer_model else "Llama2Tokenizer"
        assert inputs.tokenizer.tokenizer_type == inputs.state.tokenizer["type"] == kind
        assert inputs.tokenizer.fingerprint == load_tokenizer(path).fingerprint
