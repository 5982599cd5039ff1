"""Tests sources: construction from a configuration, one epoch, and errors that name the input."""

import json
import os
import time

import numpy as np
import pytest
from data_files import PlainTokenizer, data_config, numbered_documents, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.data import source as source_module
from megatron_chatflow.data.fingerprint import sampled_hash
from megatron_chatflow.data.source import build_sources
from megatron_chatflow.errors import UserError

TOKENIZER = PlainTokenizer()


def build(sources, *, seed=1, split="train", tokenizer=TOKENIZER, shares=None, **fields):
    config = data_config(sources, split=shares, **fields)
    return build_sources(config, seed=seed, tokenizer=tokenizer, split=split)


def write_sidecar(prefix, *, num_documents, num_tokens, sha256="f" * 64, hashes=None):
    sidecar = {
        "format_version": 1,
        "tool_version": "0",
        "tokenizer": {"type": "Llama2Tokenizer", "sha256": sha256, "vocab_size": 1 << 20},
        "inputs": [],
        "num_documents": num_documents,
        "num_tokens": num_tokens,
        "num_loss_tokens": num_tokens,
        "dropped": {},
        "sha256": hashes or {"bin": "b" * 64, "idx": "c" * 64},
        "num_text_bytes": 0,
    }
    with open(f"{prefix}.json", "w") as file:
        json.dump(sidecar, file)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(0, 25), max_size=12), min_size=1, max_size=3),
    seq_length=st.integers(1, 10),
    seed=st.integers(0, 2**63 - 1),
    packing=st.sampled_from(["none", "best_fit"]),
)
def test_nothing_comes_twice_before_an_epoch_ends(
    tmp_path_factory, lengths, seq_length, seed, packing
):
    folder = tmp_path_factory.mktemp("source")
    documents = numbered_documents(np.concatenate(lengths).astype(np.int64))
    paths, first = [], 0
    for number, file_lengths in enumerate(lengths):
        part = documents[first : first + len(file_lengths)]
        paths.append(write_dataset(folder / f"{number}_document", part))
        first += len(file_lengths)
    config = {"a": {"paths": paths, "packing": packing}, "b": {"paths": paths[:1]}}
    [source, _] = build(config, seed=seed, seq_length=seq_length, weights={"a": 0, "b": 0})
    for epoch in range(2):
        inputs = [
            source.sample(index).tokens[: seq_length if packing == "none" else None]
            for index in range(epoch * source.num_samples, (epoch + 1) * source.num_samples)
        ]
        tokens = np.concatenate([*inputs, np.zeros(0, np.int32)])
        tokens = tokens[tokens >= 10]  # the rest is padding
        assert len(np.unique(tokens)) == len(tokens)
        if packing == "none":
            assert len(tokens) == source.num_samples * seq_length
        else:
            assert len(tokens) == source.num_tokens
            kept = [min(length, seq_length + 1) for length in sum(lengths, []) if length > 1]
            assert source.num_tokens == sum(kept)


def test_each_epoch_has_an_order_of_its_own(tmp_path):
    path = write_dataset(tmp_path / "a_document", numbered_documents([400]))
    [source] = build({"a": {"paths": [path]}})
    assert source.num_samples == 49
    orders = [
        [int(source.sample(epoch * 49 + k).tokens[0]) for k in range(49)] for epoch in range(3)
    ]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    [other] = build({"a": {"paths": [path]}}, seed=2)
    assert [int(other.sample(k).tokens[0]) for k in range(49)] != orders[0]
    [renamed] = build({"b": {"paths": [path]}})
    assert [int(renamed.sample(k).tokens[0]) for k in range(49)] != orders[0]


def test_validation_is_held_out_by_document_and_in_order(tmp_path):
    documents = numbered_documents([6] * 20)
    path = write_dataset(tmp_path / "a_document", documents)
    config = {"a": {"paths": [path]}}
    [train] = build(config, holdout_every=5)
    [validation] = build(config, holdout_every=5, split="validation")
    held_out = np.concatenate(documents[4::5])
    assert (validation.num_tokens, validation.num_samples) == (24, 3)
    assert validation.sample(0).tokens.tolist() == held_out[:9].tolist()
    assert validation.sample_in_order(1).tokens.tolist() == held_out[8:17].tolist()
    last = validation.sample(2)
    assert last.tokens.tolist() == [*held_out[16:], 3]
    assert last.loss_mask.tolist() == [1] * 7 + [0]
    assert validation.sample(3).tokens.tolist() == validation.sample(0).tokens.tolist()
    seen = {int(t) for k in range(train.num_samples) for t in train.sample(k).tokens}
    assert not seen & set(held_out.tolist())
    [nothing] = build(config, split="validation")
    assert nothing.num_samples == 0
    with pytest.raises(UserError, match="data.sources.a: has no samples"):
        nothing.sample(0)


@pytest.mark.parametrize("packing", ["none", "best_fit"])
@pytest.mark.parametrize(
    ("shares", "num_documents", "edges"),
    [
        ("969,30,1", 1000, (969, 999, 1000)),
        ("969, 30, 1", 20, (19, 20, 20)),
        ("8,1,1", 21, (17, 19, 21)),
        ("99,1", 250, (248, 250, 250)),  # 247.5 is rounded to the even number
        ("1", 7, (7, 7, 7)),
        (".5,.25,.25", 6, (3, 4, 6)),
    ],
)
def test_documents_are_split_by_shares(tmp_path, packing, shares, num_documents, edges):
    documents = numbered_documents([8] * num_documents)
    path = write_dataset(tmp_path / "a_document", documents)
    for split, begin, end in zip(("train", "validation", "test"), (0, *edges), edges, strict=False):
        [source] = build({"a": {"paths": [path], "packing": packing}}, split=split, shares=shares)
        samples = [source.sample_in_order(k) for k in range(source.num_samples)]
        seen = {int(t) for one in samples for t in one.tokens if t >= 10}
        expected = np.concatenate([*documents[begin:end], np.zeros(0, np.int64)])
        # The last training window may lack its final token.
        if split == "train" and packing == "none":
            expected = expected[: source.num_samples * 8 + 1]
        assert seen == set(expected.tolist())


def test_a_source_with_validation_paths_is_not_split(tmp_path):
    train_path = write_dataset(tmp_path / "a_document", numbered_documents([6] * 20))
    path = write_dataset(tmp_path / "v_document", numbered_documents([9], first=5000))
    config = {"a": {"paths": [train_path], "validation_paths": [path]}}
    sizes = [
        build(config, split=split, shares="8,1,1")[0].num_tokens
        for split in ("train", "validation", "test")
    ]
    assert sizes == [120, 9, 0]


def test_validation_paths_take_the_place_of_holding_out(tmp_path):
    train_path = write_dataset(tmp_path / "a_document", numbered_documents([6] * 20))
    path = write_dataset(tmp_path / "v_document", numbered_documents([9], first=5000))
    config = {"a": {"paths": [train_path], "validation_paths": [path]}}
    [train] = build(config, holdout_every=5)
    [validation] = build(config, holdout_every=5, split="validation")
    assert train.num_tokens == 120
    assert validation.sample(0).tokens.tolist() == list(range(5000, 5009))


def test_response_loss_and_isolation_reach_the_samples(tmp_path):
    documents = numbered_documents([3, 6])
    masks = [[0, 1, 1], [1, 0, 0, 1, 1, 1]]
    path = write_dataset(tmp_path / "a_document", documents, masks=masks)
    config = {"a": {"paths": [path], "loss": "response", "boundaries": "isolate"}}
    [source] = build(config)
    sample = source.sample(0)
    assert sample.loss_mask.tolist() == [1, 1, 0, 0, 0, 1, 1, 1]
    assert sample.cu_seqlens.tolist() == [0, 3, 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paths": ["/nowhere/x_document"]}, r"data\.sources\.a\.paths\[0\]: .*x_document"),
        ({"validation_paths": ["/nowhere/y"]}, None),
        ({"loss": "response"}, r"data\.sources\.a\.paths\[0\]: no loss masks for"),
    ],
)
def test_bad_paths_name_their_place_in_the_configuration(tmp_path, change, message):
    path = write_dataset(tmp_path / "a_document", numbered_documents([50]))
    config = {"a": {"paths": [path], **change}}
    if message is None:
        assert build(config)
        message = r"data\.sources\.a\.validation_paths\[0\]: .*/nowhere/y"
        with pytest.raises(UserError, match=message):
            build(config, split="validation")
        return
    with pytest.raises(UserError, match=message) as caught:
        build(config)
    assert "\n" not in str(caught.value)


def test_an_empty_source_may_have_no_weight(tmp_path):
    full = write_dataset(tmp_path / "a_document", numbered_documents([50]))
    empty = write_dataset(tmp_path / "b_document", [[1, 2]])
    config = {"a": {"paths": [full]}, "b": {"paths": [empty]}}
    sources = build(config, weights={"a": 1, "b": 0})
    assert [source.num_samples for source in sources] == [6, 0]
    with pytest.raises(
        UserError, match=r"data\.sources\.b: is empty \(2 tokens do not fill a sample"
    ):
        build(config, weights={"a": 1, "b": 0.5})


def write_masked(folder, masks, name="m"):
    documents = numbered_documents([len(mask) for mask in masks])
    return write_dataset(folder / f"{name}_document", documents, masks=masks)


def build_packed(path, *, loss="response", **arguments):
    source = {"paths": [path], "loss": loss, "packing": "best_fit", "boundaries": "isolate"}
    config = data_config({"chat": source}, weights={"chat": 1})
    return build_sources(config, seed=1, tokenizer=TOKENIZER, **arguments)[0]


def test_documents_without_loss_tokens_keep_old_runs_valid(tmp_path):
    path = write_masked(tmp_path, [[0, 0, 1, 1], [0] * 6, [0, 1, 1]])
    source = build_packed(path)
    assert source.packing.num_without_loss == 1
    # A run started by an earlier version continues with the samples that it started with.
    old = build_packed(path, packing_versions={"chat": 1})
    assert old.packing.num_without_loss == 0 and len(old.packing.documents) == 3
    assert (old.fingerprint()["packing"], source.fingerprint()["packing"]) == (1, 2)
    assert old.fingerprint() == build_packed(path, loss="all").fingerprint()
    # If every document has loss tokens, the versions do not differ.
    path = write_masked(tmp_path, [[0, 0, 1, 1], [0, 1, 0], [0, 1, 1]], "n")
    assert build_packed(path).fingerprint()["packing"] == 1
    old = build_packed(path, packing_versions={"chat": 1})
    assert old.fingerprint() == build_packed(path).fingerprint()


def test_a_source_without_any_loss_token_is_empty(tmp_path):
    path = write_masked(tmp_path, [[0] * 4, [0] * 6])
    with pytest.raises(UserError, match=r"is empty \(2 documents have no loss token in 8 tokens\)"):
        build_packed(path)


def test_a_corpus_of_another_tokenizer_is_refused(tmp_path):
    path = write_dataset(tmp_path / "a_document", numbered_documents([50]))
    config = {"a": {"paths": [path]}}
    write_sidecar(path, num_documents=1, num_tokens=50)
    assert build(config)[0].num_samples == 6
    write_sidecar(path, num_documents=1, num_tokens=50, sha256="e" * 64)
    with pytest.raises(UserError, match=r"paths\[0\]: .* encoded with another tokenizer .*eeee"):
        build(config)
    write_sidecar(path, num_documents=1, num_tokens=51)
    with pytest.raises(
        UserError, match="describes another dataset: num_tokens is 51 in the .json, but 50"
    ):
        build(config)


def test_ids_outside_the_vocabulary_are_refused_at_the_start(tmp_path):
    path = write_dataset(tmp_path / "a_document", numbered_documents([50]))
    with pytest.raises(UserError, match=r"paths\[0\]: .*token 30 is id 40, outside .* 40"):
        build({"a": {"paths": [path]}}, tokenizer=PlainTokenizer(vocab_size=40))


def test_fingerprints_know_content_and_not_names(tmp_path):
    def fingerprint(name, lengths, sidecar=False, **fields):
        path = write_dataset(tmp_path / f"{name}_document", numbered_documents(lengths))
        if sidecar:
            write_sidecar(path, num_documents=len(lengths), num_tokens=sum(lengths))
        [source] = build({"s": {"paths": [path]}}, **fields)
        return source.fingerprint()

    first = fingerprint("a", [30, 20])
    assert first == fingerprint("b", [30, 20]) == json.loads(json.dumps(first))
    assert first != fingerprint("c", [20, 30])
    assert first != fingerprint("d", [30, 20], seq_length=4)
    with_sidecar = fingerprint("e", [30, 20], sidecar=True)
    assert with_sidecar == fingerprint("f", [30, 20], sidecar=True)
    assert with_sidecar["datasets"][0]["sha256"] == {"bin": "b" * 64, "idx": "c" * 64}
    assert str(tmp_path) not in json.dumps([first, with_sidecar])


def test_sampled_hash_sees_size_ends_and_middle(tmp_path):
    path = tmp_path / "file"
    content = bytearray(np.random.default_rng(0).bytes(1 << 20))
    hashes = set()
    for place in (None, 0, 1 << 19, (1 << 20) - 1):
        changed = bytearray(content)
        if place is not None:
            changed[place] ^= 1
        path.write_bytes(changed)
        hashes.add(sampled_hash(path))
    path.write_bytes(content + b"\0")
    hashes.add(sampled_hash(path))
    assert len(hashes) == 5
    with pytest.raises(UserError, match="cannot read: .*missing"):
        sampled_hash(tmp_path / "missing")


def test_sampled_hash_reads_a_file_again_once_it_is_written_to(tmp_path):
    path = tmp_path / "file"
    hashes = []
    for content, modified_ns in ((b"ab", 10), (b"ab", 10), (b"ba", 11)):
        path.write_bytes(content)
        os.utime(path, ns=(modified_ns, modified_ns))
        hashes.append(sampled_hash(path))
    assert hashes[0] == hashes[1] != hashes[2]


def test_files_that_change_during_the_run_are_named(tmp_path, monkeypatch):
    path = write_dataset(tmp_path / "a_document", numbered_documents([50]))
    [source] = build({"a": {"paths": [path]}})
    monkeypatch.setattr(source_module, "_CHECK_SECONDS", 0.0)
    time.sleep(0.001)
    source.check_files()
    os.truncate(f"{path}.bin", 100)
    with pytest.raises(UserError, match=r"data\.sources\.a: .*a_document\.bin: changed"):
        source.check_files()
    os.remove(f"{path}.bin")
    with pytest.raises(UserError, match=r"data\.sources\.a: .*a_document\.bin: No such file"):
        source.check_files()
