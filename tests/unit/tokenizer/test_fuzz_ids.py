r"""Compares ids with those of sentencepiece and tokenizers on random documents.

The suite runs a few thousand documents of made-up text on two tiny models. The full run is

    python -m pytest tests/unit/tokenizer/test_fuzz_ids.py --fuzz-documents 100000 \
        --fuzz-corpus .demo/corpus --fuzz-model .demo/corpus/tokenizer.model \
        --fuzz-model smollm2/tokenizer.json

The reference for a `tokenizer.json` is the library without the special tokens of the file. Raw text
must not become a control id, but by default the library converts it. This also tests the library's
switch `encode_special_tokens`, on which the package relies.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import orjson
import pytest
import sentencepiece
import tokenizers
from fuzz_text import careless_lines, fuzz_documents
from made_up_text import made_up_sentences

from megatron_chatflow.data.indexed import IndexedDataset
from megatron_chatflow.preprocess import PreprocessSettings, preprocess
from megatron_chatflow.preprocess.settings import CorpusSettings
from megatron_chatflow.tokenizer import load_tokenizer

BATCH = 2000
Reference = Callable[[Sequence[str]], list[list[int]]]


@pytest.fixture
def models(
    request: pytest.FixtureRequest, tiny_sentencepiece_model: Path, byte_level_model: Path
) -> list[Path]:
    given = [Path(name).resolve() for name in request.config.getoption("--fuzz-model")]
    return [tiny_sentencepiece_model, byte_level_model, *given]


@pytest.fixture
def batches(request: pytest.FixtureRequest) -> Callable[[int], Iterator[list[str]]]:
    """Returns batches of documents for a seed."""
    texts = made_up_sentences(2000, seed=7)
    folder = request.config.getoption("--fuzz-corpus")
    for path in sorted(Path(folder).glob("*.train.jsonl")) if folder else []:
        records = [orjson.loads(line) for line in path.read_bytes().splitlines()]
        texts += [
            value for r in records for value in r.values() if isinstance(value, str) and value
        ]
    num_documents = request.config.getoption("--fuzz-documents")

    def make(seed: int) -> Iterator[list[str]]:
        documents = fuzz_documents(texts, num_documents, seed)
        while batch := list(islice(documents, BATCH)):
            yield batch

    return make


def reference_of(path: Path) -> Reference:
    """Returns the ids of texts from the model's own library."""
    if path.suffix != ".json":
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        return lambda texts: [processor.encode(text) for text in texts]
    content = json.loads(path.read_bytes())
    content["added_tokens"] = [t for t in content["added_tokens"] if not t["special"]]
    model = tokenizers.Tokenizer.from_str(json.dumps(content))
    model.no_truncation()
    return lambda texts: [e.ids for e in model.encode_batch(list(texts), add_special_tokens=False)]


def test_ids_are_the_librarys(
    models: list[Path], batches: Callable[[int], Iterator[list[str]]]
) -> None:
    for seed, model in enumerate(models):
        ours, reference = load_tokenizer(model), reference_of(model)
        control = {ours.bos_id, ours.eos_id, ours.unk_id} - {-1}
        for batch in batches(seed):
            expected = reference(batch)
            found = ours.encode_batch(batch)
            wrong = [k for k in range(len(batch)) if found[k] != expected[k]]
            assert not wrong, f"{model}: {batch[wrong[0]]!r}"
            assert not any(control.intersection(ids) for ids in found)


def test_what_lies_on_disk_is_the_librarys(
    models: list[Path], batches: Callable[[int], Iterator[list[str]]], tmp_path: Path
) -> None:
    """Covers the whole path: JSON lines, bytes that are not UTF-8, and empty documents."""
    for seed, model in enumerate(models):
        reference, documents, num_bad = reference_of(model), [], 0
        eod_id = load_tokenizer(model).eos_id
        with (tmp_path / "in.jsonl").open("wb") as file:
            for batch in batches(100 + seed):
                lines, num = careless_lines(batch, seed)
                num_bad += num
                for line in lines:
                    file.write(line + b"\n")
                    documents.append(json.loads(line.decode("utf-8", "replace"))["text"])
        settings = PreprocessSettings(
            inputs=(str(tmp_path / "in.jsonl"),),
            output_prefix=str(tmp_path / "out"),
            tokenizer_model=str(model),
            corpus=CorpusSettings(invalid_utf8="replace"),
            append_eod=True,
            num_workers=2,
            overwrite=True,
        )
        content = preprocess(settings)["text"]
        assert content["repaired"].get("invalid_utf8", 0) == num_bad > 0
        dataset = IndexedDataset(tmp_path / "out_text_document")
        position = num_empty = 0
        for begin in range(0, len(documents), BATCH):
            for text, ids in zip(
                documents[begin:], reference(documents[begin : begin + BATCH]), strict=False
            ):
                if not ids:
                    num_empty += 1
                    continue
                assert dataset[position].tolist() == [*ids, eod_id], f"{model}: {text!r}"
                position += 1
        assert position == len(dataset)
        assert content["dropped"].get("empty", 0) == num_empty > 0
