"""Tests the selectors of stages."""

import pytest

from megatron_chatflow.config.stages import (
    ALL_ROWS,
    EMBEDDING,
    OUTPUT,
    merge_rows,
    parse_selector,
    select,
)
from megatron_chatflow.errors import UserError

FC1 = "decoder.layers.{}.mlp.linear_fc1.weight"
NORM = "decoder.final_layernorm.weight"


@pytest.mark.parametrize(
    ("selector", "selected", "others"),
    [
        ("all", [EMBEDDING, OUTPUT, FC1.format(0), NORM], []),
        ("embeddings", [EMBEDDING], [OUTPUT, FC1.format(0)]),
        ("output", [OUTPUT], [EMBEDDING, NORM]),
        ("layers.3", [FC1.format(3)], [FC1.format(13), FC1.format(0), NORM, EMBEDDING]),
        ("layers.2-10", [FC1.format(n) for n in (2, 9, 10)], [FC1.format(n) for n in (1, 11)]),
        ("decoder.layers.*.mlp.*", [FC1.format(7)], [NORM, EMBEDDING]),
        (NORM, [NORM], [FC1.format(0)]),
    ],
)
def test_selects_tensors(selector: str, selected: list[str], others: list[str]) -> None:
    assert parse_selector(selector) == selector
    assert [select(selector, name) for name in selected] == [ALL_ROWS] * len(selected)
    assert [select(selector, name) for name in others] == [None] * len(others)


def test_selects_rows_of_both_ends() -> None:
    for name in (EMBEDDING, OUTPUT):
        assert select("rows.100-199", name) == (100, 200)
        assert select("rows.100-", name) == (100, ALL_ROWS[1])
        assert select("new_rows", name, new_rows=(64, 80)) == (64, 80)
        assert select("new_rows", name) is None
    assert select("rows.0-", NORM) is None and select("new_rows", NORM, new_rows=(0, 9)) is None


def test_the_output_layer_of_tied_embeddings_is_the_embedding() -> None:
    assert select("output", EMBEDDING, is_tied=True) == ALL_ROWS


def test_ranges_are_joined() -> None:
    assert merge_rows([(5, 7), (0, 2), (2, 3), (6, 9), (20, 21)]) == ((0, 3), (5, 9), (20, 21))


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("embedings", "embedings: is not a selector (did you mean embeddings?)"),
        ("layers.3-1", "layers.3-1: ends before it begins"),
        ("rows.9-3", "rows.9-3: ends before it begins"),
        ("layers.", "layers.: must be a range such as layers.0-3"),
        ("rows.5", "rows.5: must be a range"),
    ],
)
def test_refuses_other_forms(selector: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_selector(selector)
    assert str(raised.value).startswith(message)
