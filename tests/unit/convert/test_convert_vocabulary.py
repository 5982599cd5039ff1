"""Tests rows for new pieces: each initialization, and that the model keeps its old behaviour."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_up_text import made_up_sentences
from new_language import NEW, new_sentences, train_model

from megatron_chatflow.convert.from_huggingface import import_huggingface
from megatron_chatflow.convert.resize import resize_checkpoint
from megatron_chatflow.convert.safetensors import HuggingFaceWeights
from megatron_chatflow.convert.to_huggingface import export_checkpoint
from megatron_chatflow.convert.vocabulary import (
    EMBEDDING_INITS,
    Resize,
    VocabularyGrowth,
    grow_rows,
    vocabulary_growth,
)
from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer
from megatron_chatflow.tokenizer.extend import extend_tokenizer

GROWTH = VocabularyGrowth(num_old=4, pieces=((0, 2), (), (3, 1, 1)), num_rows=7)
ROWS = torch.tensor([[1.0, 0.0], [2.0, 4.0], [3.0, 8.0], [6.0, 0.0]])


@pytest.fixture(scope="module")
def old(tiny_sentencepiece_model: Path) -> Tokenizer:
    return load_tokenizer(tiny_sentencepiece_model)


@pytest.fixture(scope="module")
def new(old: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return extend_tokenizer(old, NEW, tmp_path_factory.mktemp("extended"))


@pytest.fixture(scope="module")
def trained(old: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_model(old, tmp_path_factory.mktemp("trained") / "model")


def resized(trained: Path, new: Tokenizer, folder: Path, init: str) -> Path:
    import_huggingface(trained, folder / "run", resize=Resize(new, init))
    export_checkpoint(folder / "run", folder / "hf")
    return folder / "hf"


def logits(folder: Path, ids: list[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0]


def test_rows_by_each_init() -> None:
    for init in EMBEDDING_INITS:
        grown = grow_rows(ROWS, GROWTH, init, seed=1)
        assert grown.shape == (7, 2)
        assert torch.equal(grown[:4], ROWS)
    assert grow_rows(ROWS, GROWTH, "mean-of-pieces", 1)[4:].tolist() == [
        [2.0, 4.0],
        [3.0, 3.0],
        pytest.approx([10 / 3, 8 / 3]),
    ]
    assert grow_rows(ROWS, GROWTH, "mean", 1)[4:].tolist() == [[3.0, 3.0]] * 3
    first = grow_rows(ROWS, GROWTH, "copy-first-piece", 1)[4:].tolist()
    assert first == [[1.0, 0.0], [3.0, 3.0], [6.0, 0.0]]


def test_normal_rows_have_the_old_rows_mean_and_covariance() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -0.5], [0.0, 0.0, 0.3]])
    rows = torch.randn(300, 3, generator=generator) @ mix + torch.tensor([1.0, 2.0, 3.0])
    growth = VocabularyGrowth(300, tuple(() for _ in range(20_000)), 20_300)
    made = grow_rows(rows, growth, "normal", seed=4)[300:]
    assert torch.allclose(made.mean(0), rows.mean(0), atol=0.05)
    assert torch.allclose(torch.cov(made.T), torch.cov(rows.T), atol=0.05)
    assert torch.equal(made, grow_rows(rows, growth, "normal", seed=4)[300:])
    assert not torch.equal(made, grow_rows(rows, growth, "normal", seed=5)[300:])


def test_pieces_are_the_old_tokenizers_own(old: Tokenizer, new: Tokenizer) -> None:
    growth = vocabulary_growth(old, new, num_rows=517)
    assert (growth.num_old, growth.num_rows, len(growth.pieces)) == (512, 536, 24)
    for character, ids in zip(NEW, growth.pieces, strict=True):
        assert [f"<0x{byte:02X}>" for byte in character.encode()] == [
            old._processor.id_to_piece(i)
            for i in ids  # type: ignore[attr-defined]
        ]
    assert vocabulary_growth(old, old, num_rows=517) == VocabularyGrowth(512, (), 517)


def test_other_vocabularies_are_refused(old: Tokenizer, new: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a vocabulary can only grow"):
        vocabulary_growth(new, old, 536)
    model = new.model_path.parent
    content = json.loads((model / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["b"], vocabulary["d"] = vocabulary["d"], vocabulary["b"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(UserError, match="extend that tokenizer instead"):
        vocabulary_growth(old, load_tokenizer(tmp_path / "tokenizer.json"), 517)


def test_old_text_gives_the_same_bits(trained: Path, new: Tokenizer, tmp_path: Path) -> None:
    folder = resized(trained, new, tmp_path, "mean-of-pieces")
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == new.vocab_size == 536
    ids = new.encode(" ".join(made_up_sentences(2)))
    assert torch.equal(logits(folder, ids)[:, :512], logits(trained, ids)[:, :512])
    before, after = HuggingFaceWeights(trained), HuggingFaceWeights(folder)
    for name in before.files:
        assert torch.equal(after.read(name)[: before.shape(name)[0]][:512], before.read(name)[:512])
    assert load_tokenizer(folder).fingerprint == new.fingerprint


def test_mean_of_pieces_begins_below_normal(trained: Path, new: Tokenizer, tmp_path: Path) -> None:
    def bits_per_byte(folder: Path) -> float:
        total = num_bytes = 0.0
        for text in new_sentences(20, seed=99):
            ids = new.encode(text)
            losses = torch.nn.functional.cross_entropy(
                logits(folder, ids)[:-1], torch.tensor(ids[1:]), reduction="sum"
            )
            total, num_bytes = total + float(losses), num_bytes + len(text.encode())
        return total / num_bytes / 0.6931

    measured = {}
    for init in ("mean-of-pieces", "normal"):
        (tmp_path / init).mkdir()
        measured[init] = bits_per_byte(resized(trained, new, tmp_path / init, init))
    assert measured["mean-of-pieces"] < 0.9 * measured["normal"]


def test_checkpoints_are_resized_as_imports_are(
    trained: Path, new: Tokenizer, tmp_path: Path
) -> None:
    import_huggingface(trained, tmp_path / "plain")
    for init in set(EMBEDDING_INITS) - {"distill"}:  # see test_distill.py
        folder = tmp_path / init
        folder.mkdir()
        imported = resized(trained, new, folder, init)
        done = resize_checkpoint(tmp_path / "plain", folder / "resized", Resize(new, init))
        export_checkpoint(folder / "resized", folder / "hf2")
        one, other = HuggingFaceWeights(imported), HuggingFaceWeights(folder / "hf2")
        assert one.files.keys() == other.files.keys()
        assert all(torch.equal(one.read(name), other.read(name)) for name in one.files)
        assert done.num_parameters == sum(one.read(name).numel() for name in one.files)


def test_a_folder_without_tokenizer_cannot_be_resized(
    trained: Path, new: Tokenizer, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(trained / name)
    with pytest.raises(UserError, match="has no tokenizer, so the new tokens cannot"):
        import_huggingface(bare, tmp_path / "run", resize=Resize(new))
    import_huggingface(bare, tmp_path / "run")
    with pytest.raises(UserError, match="give the run's tokenizer with --old-tokenizer-model"):
        resize_checkpoint(tmp_path / "run", tmp_path / "run2", Resize(new))
    done = resize_checkpoint(
        tmp_path / "run",
        tmp_path / "run2",
        replace(Resize(new), init="mean"),
        old_tokenizer=trained / "tokenizer.model",
    )
    assert done.folder == tmp_path / "run2"
