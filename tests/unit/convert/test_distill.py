"""Tests that distilled rows of new tokens fit their text, and that nothing else changes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_up_text import made_up_sentences
from new_language import NEW, new_sentences, train_model
from tool_calls import call_tool

from megatron_chatflow.convert.distill import Distilled, _Map, _shuffled, _window, distill
from megatron_chatflow.convert.safetensors import HuggingFaceWeights
from megatron_chatflow.convert.shape import shape_of_huggingface
from megatron_chatflow.convert.vocabulary import Resize, grow_rows, vocabulary_growth
from megatron_chatflow.preprocess.texts import read_texts
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer
from megatron_chatflow.tokenizer.extend import extend_tokenizer

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
UNSEEN = "龘"  # a new character that no text contains


@pytest.fixture(scope="module")
def old(tiny_sentencepiece_model: Path) -> Tokenizer:
    return load_tokenizer(tiny_sentencepiece_model)


@pytest.fixture(scope="module")
def new(old: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return extend_tokenizer(old, [*NEW, UNSEEN], tmp_path_factory.mktemp("extended"))


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def trained(
    request: pytest.FixtureRequest, old: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return train_model(old, folder / "model", is_tied=request.param)


@pytest.fixture(scope="module")
def small_model(old: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_model(old, tmp_path_factory.mktemp("small") / "model", num_steps=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "zh.txt"
    path.write_text("\n".join(new_sentences(120, seed=7)) + "\n", encoding="utf-8")
    return path


def fit(trained: Path, old: Tokenizer, resize: Resize) -> Distilled:
    shape = shape_of_huggingface(trained)
    files = HuggingFaceWeights(trained)
    weights = {name: files.read(name) for name in files.files}
    return distill(
        weights, shape, old, vocabulary_growth(old, resize.tokenizer, shape.vocab_size), resize
    )


def mean_of_pieces(trained: Path, old: Tokenizer, new: Tokenizer, name: str) -> torch.Tensor:
    rows = HuggingFaceWeights(trained).read(name)
    growth = vocabulary_growth(old, new, len(rows))
    return grow_rows(rows, growth, "mean-of-pieces", 0)[old.vocab_size : new.vocab_size]


def test_rows_lower_the_loss_and_the_distance_of_states(
    trained: Path, old: Tokenizer, new: Tokenizer, text: Path
) -> None:
    resize = Resize(new, "distill", distill_text=read_texts([str(text)]), distill_tokens=1200)
    done = fit(trained, old, resize)
    assert done.after.bits_per_byte < 0.9 * done.before.bits_per_byte
    if OUTPUT in done.rows:  # the states of the tied model hardly depend on their inputs
        assert done.after.distance < 0.7 * done.before.distance
    assert done.num_fitted == len(NEW) and done.num_tokens <= 1200
    assert "1 do not occur in the text and are only mapped" in str(done)
    for name, rows in done.rows.items():
        initial = mean_of_pieces(trained, old, new, name)
        assert not torch.isclose(rows, initial).all(dim=1).any()


def test_a_map_begins_as_the_mean_and_serves_tokens_without_text() -> None:
    known = torch.randn(6, 4)
    rows = _Map(known, [(0, 2, 3), (5,), ()])
    mean = torch.stack([known[[0, 2, 3]].mean(0), known[5], known.mean(0)])
    assert torch.equal(rows(mean), mean)
    with torch.no_grad():
        rows.weights.copy_(torch.tensor([2.0, 3.0]))
        rows.constant.fill_(1.0)
        rows.matrix.fill_diagonal_(0.5)
    expected = 1.5 * mean + 1
    expected[0] += 2 * known[0] + 3 * known[3]
    expected[1] += 5 * known[5]
    torch.testing.assert_close(rows(mean).detach(), expected)


def test_a_seed_gives_the_same_rows(
    small_model: Path, old: Tokenizer, new: Tokenizer, text: Path
) -> None:
    texts = tuple(read_texts([str(text)]))
    resize = Resize(new, "distill", distill_text=texts, distill_tokens=150)
    rows = fit(small_model, old, resize).rows
    again = fit(small_model, old, resize).rows
    assert all(torch.equal(again[name], rows[name]) for name in (EMBEDDING, OUTPUT))
    other = fit(small_model, old, replace(resize, seed=5)).rows
    assert not torch.equal(other[EMBEDDING], rows[EMBEDDING])


def test_import_and_resize_write_the_fitted_rows(
    trained: Path, old: Tokenizer, new: Tokenizer, text: Path, tmp_path: Path
) -> None:
    resize = Resize(new, "distill", distill_text=read_texts([str(text)]), distill_tokens=150)
    expected = fit(trained, old, resize).rows
    flags = ("--tokenizer-model", new.model_path, "--embedding-init", "distill")
    flags += ("--distill-text", text, "--distill-tokens", 150)
    start = ("import", "--hf", trained, "--output")
    assert call_tool("convert_checkpoint.py", *start, tmp_path / "plain").returncode == 0
    done = call_tool("convert_checkpoint.py", *start, tmp_path / "imported", *flags)
    assert done.returncode == 0, done.stderr
    resized = ("resize", "--checkpoint", tmp_path / "plain", "--output", tmp_path / "resized")
    assert call_tool("convert_checkpoint.py", *resized, *flags).returncode == 0
    before = HuggingFaceWeights(trained)
    for name in ("imported", "resized"):
        call_tool(
            *("convert_checkpoint.py", "export", "--checkpoint", tmp_path / name),
            *("--output", tmp_path / f"{name}_hf"),
        )
        after = HuggingFaceWeights(tmp_path / f"{name}_hf")
        assert after.files.keys() == before.files.keys()
        for tensor in before.files:
            found, known = after.read(tensor), before.read(tensor)
            if tensor in (EMBEDDING, OUTPUT):
                assert torch.equal(found[old.vocab_size : new.vocab_size], expected[tensor])
                found, known = found[: old.vocab_size], known[: old.vocab_size]
            assert torch.equal(found, known)


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("no new characters\nat all\n", (), "no new token of"),
        ("", (), "no new token of"),
        (NEW[0] + NEW[1] + "\n", (), "has only one document"),
        (None, (), "zh.txt"),
        ("ab\n", ("--distill-tokens", 5), "--distill-tokens: must be at least 100, not 5"),
    ],
)
def test_text_that_cannot_be_used_is_refused(
    content: str | None,
    flags: tuple[object, ...],
    message: str,
    new: Tokenizer,
    old: Tokenizer,
    small_model: Path,
    tmp_path: Path,
) -> None:
    if content is not None:
        (tmp_path / "zh.txt").write_text(content, encoding="utf-8")
    done = call_tool(
        *("convert_checkpoint.py", "import", "--hf", small_model, "--output", tmp_path / "run"),
        *("--tokenizer-model", new.model_path, "--embedding-init", "distill"),
        *("--distill-text", tmp_path / "zh.txt", *flags),
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
    assert not (tmp_path / "run").exists()


def test_flags_that_need_each_other(new: Tokenizer, small_model: Path, tmp_path: Path) -> None:
    start = ("convert_checkpoint.py", "import", "--hf", small_model, "--output", tmp_path / "run")
    extended = ("--tokenizer-model", new.model_path)
    for flags in (
        (*extended, "--embedding-init", "distill"),
        (*extended, "--distill-text", "zh.txt"),
        (*extended, "--distill-tokens", 1000),
        ("--distill-text", "zh.txt", "--embedding-init", "distill"),
        ("--distill-tokens", 1000),
    ):
        done = call_tool(*start, *flags)
        assert done.returncode == 2 and "--embedding-init distill" in done.stderr, flags
        assert not (tmp_path / "run").exists()


def test_windows_match_where_tokens_end_at_the_same_byte(old: Tokenizer, new: Tokenizer) -> None:
    text = made_up_sentences(1)[0] + NEW[0] + UNSEEN + NEW[3] + "b"
    window = _window(old, new, text, 100, 512)
    assert window is not None and len(window.teacher) > len(window.student)
    num_matches = 0
    for number, place in enumerate(window.matches):
        if place >= 0:
            num_matches += 1
            ends = [window.student[: number + 1], window.teacher[: place + 1]]
            assert new.decode(ends[0]) == old.decode(ends[1])
    assert num_matches == len(window.student)
    assert window.num_bytes == int(new.num_bytes_per_id[window.student[1:]].sum())
    cut = _window(old, new, text, 5, 512)
    assert cut is not None and cut.student == window.student[:5]
    short = _window(old, new, text, 100, 4)  # a model of four positions
    assert short is not None and len(short.teacher) <= 4
    assert _window(old, new, "b", 1, 512) is None


def test_a_choice_of_documents_is_bounded_and_random() -> None:
    texts = [f"{k:03}" for k in range(300)]
    chosen = _shuffled(iter(texts), 90, seed=1)
    assert len(chosen) == 30 and chosen != sorted(chosen) and set(chosen) < set(texts)
    assert _shuffled(iter(texts), 45, seed=1) == chosen[:15]
    assert _shuffled(iter(texts), 90, seed=2) != chosen
