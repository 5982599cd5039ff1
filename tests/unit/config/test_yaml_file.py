"""Tests that YAML's pitfalls are avoided and that every broken file gives a clear message."""

import pytest

from megatron_chatflow.config.yaml_file import dump_yaml, parse_yaml, read_yaml
from megatron_chatflow.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e6", 1e6),
        (".5", 0.5),
        ("1_000_000", 1_000_000),
        ("010", 10),
        ("-3", -3),
        ("true", True),
        ("False", False),
        ("null", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("0x10", "0x10"),
        ("5M", "5M"),
        ("'3'", "3"),
        (".inf", float("inf")),
        ("-.inf", float("-inf")),
    ],
)
def test_scalars_follow_the_core_schema(text: str, value: object) -> None:
    parsed = parse_yaml(f"key: {text}", "run.yaml")["key"]
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    "value", ["3e-4", "no", "true", "3", "null", "", "~", "1_0", "<<", "=", "a: b", "中文", "- x"]
)
def test_text_that_looks_like_something_else_stays_text(value: str) -> None:
    assert parse_yaml(dump_yaml({value: [value]}), "x") == {value: [value]}


def test_keys_that_look_like_something_else_stay_as_written() -> None:
    assert parse_yaml("no: 1", "x") == {"no": 1}


def test_anchors_and_merges_work() -> None:
    text = "base: &base {a: 1, b: 2}\nother: {<<: *base, b: 3}"
    assert parse_yaml(text, "x")["other"] == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  seed: 1\n  seed: 2", "run.yaml: line 3 duplicate key seed"),
        ("a: [1", "run.yaml: line"),
        ("a: b: c", "run.yaml: line 1 mapping values are not allowed here"),
        ("\ta: 1", "run.yaml: line 1 found character"),
        ("- a\n- b", "run.yaml: must be a mapping of keys, not a list"),
        ("just text", "run.yaml: must be a mapping"),
        ("a: !!python/object/apply:os.system [true]", "run.yaml: line 1 could not determine a con"),
        ("a: !!python/name:os.system", "run.yaml: line 1 could not determine a constructor"),
        ("{a: 1}: 2", "run.yaml: line 1 a key must be plain text"),
        ("a: *unknown", "run.yaml: line 1 found undefined alias"),
        ("--- {a: 1}\n--- {b: 2}", "run.yaml: line 2 but found another document"),
        ("a: \x00", "run.yaml: "),
        ('a:\n- "x\\ud83d"', "run.yaml: line 2 \\ud83d is half of a character: write"),
        ('"\\udc00": 1', "run.yaml: line 1 \\udc00 is half of a character"),
    ],
)
def test_a_broken_file_is_one_line_with_its_place(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "run.yaml")
    assert str(caught.value).startswith(message)


def test_an_empty_file_is_an_empty_configuration() -> None:
    assert parse_yaml("# nothing yet\n", "run.yaml") == {}


def test_files_that_cannot_be_read_are_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: no such configuration file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="Is a directory"):
        read_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: caf\xe9")
    with pytest.raises(UserError, match=r"latin\.yaml: byte 6 is not UTF-8"):
        read_yaml(tmp_path / "latin.yaml")
