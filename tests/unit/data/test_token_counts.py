"""Tests the numbers of tokens in an epoch against all of its samples."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import PlainTokenizer, data_config, numbered_documents, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.data.source import Source, build_sources, token_epochs
from megatron_chatflow.errors import UserError


def build(source: dict[str, Any], count: str = "loss_tokens", **fields: Any) -> Source:
    config = data_config({"a": source}, **fields)
    config = replace(config, schedule=replace(config.schedule, count=count))
    [built] = build_sources(config, seed=1, tokenizer=PlainTokenizer())
    epochs = token_epochs(config, [built])
    assert epochs == {"a": (built.counted_tokens, built.num_samples)}
    return built


@settings(max_examples=120, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(0, 25), max_size=14), min_size=1, max_size=3),
    seq_length=st.integers(1, 9),
    density=st.sampled_from([None, 0.2, 0.7]),
    settings_of_source=st.sampled_from(
        [{}, {"boundaries": "isolate"}, {"packing": "best_fit", "boundaries": "isolate"}]
    ),
    held_out=st.sampled_from([{}, {"holdout_every": 3}, {"split": "60,20,20"}]),
)
def test_counts_equal_the_masks_of_all_samples(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[list[int]],
    seq_length: int,
    density: float | None,
    settings_of_source: dict[str, str],
    held_out: dict[str, Any],
) -> None:
    folder = tmp_path_factory.mktemp("counts")
    rng = np.random.default_rng(sum(map(sum, lengths)))
    paths = []
    for number, part in enumerate(lengths):
        masks = None if density is None else [rng.random(length) < density for length in part]
        path = folder / f"{number}_document"
        paths.append(write_dataset(path, numbered_documents(np.array(part, int)), masks=masks))
    loss = "all" if density is None else "response"
    source = {"paths": paths, "loss": loss, **settings_of_source}
    fields = {"seq_length": seq_length, "weights": {"a": 1}, **held_out}
    try:
        built = build(source, **fields)
    except UserError as error:
        assert "is empty" in str(error) or "has no loss tokens, so data.schedule.count" in str(
            error
        )
        return
    masks = [built.sample_in_order(k).loss_mask for k in range(built.num_samples)]
    assert built.counted_tokens == sum(int(mask.sum()) for mask in masks)
    tokens = build(source, "tokens", **fields)
    if "packing" in source:
        rows = [built.sample_in_order(k).tokens for k in range(built.num_samples)]
        assert tokens.counted_tokens == sum(int((row >= 10).sum()) for row in rows)
    else:
        assert tokens.counted_tokens == built.num_samples * seq_length


def test_the_number_of_a_source_with_masks_is_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = numbered_documents([30] * 20)
    masks = [rng.random(30) < 0.3 for _ in documents]
    path = write_dataset(tmp_path / "a_document", documents, masks=masks)
    source = {"paths": [path], "loss": "response"}
    number = build(source).counted_tokens
    [kept] = tmp_path.glob("a_document.loss_tokens.*")
    content = json.loads(kept.read_text())
    assert content["loss_tokens"] == number
    kept.write_text(json.dumps({**content, "loss_tokens": 7}))
    assert build(source).counted_tokens == 7  # it is read, not counted again
    for damaged in ("{", "[]", json.dumps({**content, "key": "0"}), '{"key": 1}'):
        kept.write_text(damaged)
        assert build(source).counted_tokens == number
    # Another length of samples has another number.
    assert build(source, seq_length=70).counted_tokens != number
    assert build({"paths": [path], "loss": "all"}).counted_tokens == 74 * 8
