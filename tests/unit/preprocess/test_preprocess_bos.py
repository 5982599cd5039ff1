"""Tests `--append-bos`: the position of BOS, the record in the sidecar, and refused merges."""

import json
from pathlib import Path

import numpy as np
import pytest
from preprocess_jobs import Jobs

from megatron_chatflow.data.indexed import IndexedDataset
from megatron_chatflow.data.packing import make_packed_samples, pack_documents
from megatron_chatflow.data.samples import SampleShape, open_token_file
from megatron_chatflow.data.sidecar import appends_bos, read_sidecar, sidecar_path
from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.merge import merge_datasets
from megatron_chatflow.preprocess.settings import CorpusSettings
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.chat_template import JinjaTemplate

TEXTS = ["bana kifu", "", "luno <s> sanka", "今 rasen"]


@pytest.fixture
def jobs(tmp_path: Path, tiny_sentencepiece_model: Path) -> Jobs:
    return Jobs(tmp_path, tiny_sentencepiece_model)


@pytest.mark.parametrize("append_eod", [False, True])
@pytest.mark.parametrize("way", ["lines", "dedup", "txt", "workers"])
def test_every_text_begins_with_bos(jobs: Jobs, append_eod: bool, way: str) -> None:
    options = {"dedup": way == "dedup", "num_workers": 2 if way == "workers" else 1}
    corpus = CorpusSettings(txt_documents="line" if way == "txt" else "file")
    if way == "txt":
        path = str(jobs.folder / "a.txt")
        Path(path).write_text("\n".join(TEXTS) + "\n")
    else:
        path = jobs.lines("a.jsonl", [{"text": text} for text in TEXTS])
    without = jobs.run(path, corpus=corpus, append_eod=append_eod, **options)
    plain = jobs.documents()
    content = jobs.run(path, corpus=corpus, append_bos=True, append_eod=append_eod, **options)
    bos = load_tokenizer(jobs.model).bos_id
    assert jobs.documents() == [[bos, *ids] for ids in plain]
    assert all(bos not in ids for ids in plain) and len(plain) == 3
    assert content["num_tokens"] == without["num_tokens"] + 3
    assert content["num_text_bytes"] == without["num_text_bytes"]
    assert content["dropped"] == without["dropped"]
    assert content["settings"]["append_bos"] is True and appends_bos(content)
    assert without["settings"]["append_bos"] is False and not appends_bos(without)


@pytest.mark.parametrize("loss", ["response", "all"])
def test_bos_has_no_loss_and_counts_as_a_token(jobs: Jobs, loss: str) -> None:
    messages = [{"role": "user", "content": "bana"}, {"role": "assistant", "content": "kifu 今"}]
    path = jobs.lines("a.jsonl", [{"messages": [*messages, *messages]}])
    corpus = CorpusSettings(format="chat", json_keys=("messages",), loss=loss)
    jobs.run(path, corpus=corpus)
    (plain,), (mask,) = jobs.documents("messages"), jobs.masks("messages")
    jobs.run(path, corpus=corpus, append_bos=True)
    bos = load_tokenizer(jobs.model).bos_id
    assert jobs.documents("messages") == [[bos, *plain]]
    assert jobs.masks("messages") == [[0, *mask]]
    # Cut between turns. BOS is one of the tokens that the limit counts.
    limit = len(plain)
    jobs.run(path, corpus=corpus, append_bos=True, max_tokens=limit)
    (cut,) = jobs.documents("messages")
    assert cut[0] == bos and cut == [bos, *plain[: len(cut) - 1]] and len(cut) < limit
    assert load_tokenizer(jobs.model).eos_id == cut[-1]


def test_a_template_that_writes_bos_gets_no_second(
    jobs: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    source = (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
        "[Q]{{ message.content }}[A]{% else %}{{ message.content + eos_token }}"
        "{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "bana"}, {"role": "assistant", "content": "kifu"}]
    path = jobs.lines("a.jsonl", [{"messages": messages}])
    template = JinjaTemplate("own.jinja", source)
    corpus = CorpusSettings(format="chat", json_keys=("messages",), chat_template=template)
    jobs.run(path, corpus=corpus)
    plain = jobs.documents("messages")
    jobs.run(path, corpus=corpus, append_bos=True)
    assert jobs.documents("messages") == plain
    tokenizer = load_tokenizer(jobs.model)
    assert plain[0].count(tokenizer.bos_id) == 1
    # The flag is not recommended for it either.
    tokenizer.save_pretrained(jobs.folder / "llama", add_bos_token=True)
    jobs.model = jobs.folder / "llama"
    jobs.run(path, corpus=corpus)
    assert jobs.documents("messages") == plain
    assert "--append-bos" not in caplog.text


def test_packed_documents_keep_their_bos(jobs: Jobs) -> None:
    pairs = [{"en": f"bana {k}", "zh": f"kifu {k}"} for k in range(12)]
    path = jobs.lines("a.jsonl", pairs)
    jobs.run(path, corpus=CorpusSettings(format="pairs"), append_bos=True, append_eod=True)
    tokenizer = load_tokenizer(jobs.model)
    file = open_token_file(f"{jobs.prefix}_text_document", with_loss_mask=True)
    packing = pack_documents([file], "train", None, 64)
    shape = SampleShape(64, tokenizer.pad_id, tokenizer.vocab_size, isolate=True)
    samples = make_packed_samples("s", [file], packing, shape)
    num_begins = 0
    for number in range(samples.num_samples):
        tokens, loss_mask, cu_seqlens = samples.rows.read(number)
        begins = np.flatnonzero(tokens == tokenizer.bos_id)
        assert set(begins[begins < 64]) <= set(cu_seqlens.tolist())
        assert not loss_mask[begins[begins > 0] - 1].any()  # as a label, BOS has no loss
        num_begins += len(begins)
    assert num_begins == 12


def test_a_tokenizer_without_bos_is_refused(tmp_path: Path, byte_level_model: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(byte_level_model.read_bytes())
    config = {"bos_token": None, "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    jobs = Jobs(tmp_path, tmp_path)
    path = jobs.lines("a.jsonl", [{"text": "bana"}])
    with pytest.raises(UserError, match="--append-bos: the tokenizer has no BOS token"):
        jobs.run(path, append_bos=True)


def test_a_model_that_begins_with_bos_is_pointed_out(
    jobs: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(jobs.model)
    tokenizer.save_pretrained(jobs.folder / "llama", add_bos_token=True)
    path = jobs.lines("a.jsonl", [{"text": "bana"}])
    jobs.model = jobs.folder / "llama"
    jobs.run(path, append_bos=True)
    assert not caplog.records
    jobs.run(path)
    assert "--append-bos to add it" in caplog.text


def test_datasets_with_and_without_bos_are_not_merged(jobs: Jobs) -> None:
    path = jobs.lines("a.jsonl", [{"text": "bana"}])
    prefixes = {}
    for name, options in {"plain": {}, "begun": {"append_bos": True}, "old": {}}.items():
        jobs.prefix = jobs.folder / name
        jobs.run(path, **options)
        prefixes[name] = Path(f"{jobs.prefix}_text_document")
    sidecar = read_sidecar(prefixes["old"])
    assert sidecar is not None
    del sidecar["settings"]["append_bos"]  # as written by earlier versions
    sidecar_path(prefixes["old"]).write_text(json.dumps(sidecar))
    merged = jobs.folder / "merged_text_document"
    for other in "plain", "old":
        with pytest.raises(UserError, match="different settings: documents of .*begun_text"):
            merge_datasets([prefixes[other], prefixes["begun"]], merged)
    assert merge_datasets([prefixes["plain"], prefixes["old"]], merged) == 2
    merge_datasets([prefixes["begun"], prefixes["begun"]], merged, overwrite=True)
    assert appends_bos(read_sidecar(merged)) and len(IndexedDataset(merged)) == 2


def test_parts_of_an_earlier_version_are_kept(jobs: Jobs) -> None:
    paths = [jobs.lines(f"{k}.jsonl", [{"text": f"bana {k}"}]) for k in range(2)]
    jobs.run(*paths, shard=(0, 2))
    part = Path(f"{jobs.prefix}_part00000of00002_text_document")
    sidecar = read_sidecar(part)
    assert sidecar is not None
    del sidecar["settings"]["append_bos"]
    sidecar_path(part).write_text(json.dumps(sidecar))
    jobs.run(*paths, shard=(0, 2), overwrite=False)  # the finished dataset
    with pytest.raises(UserError, match="created from other inputs or with other options"):
        jobs.run(*paths, shard=(0, 2), overwrite=False, append_bos=True)
