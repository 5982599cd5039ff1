"""Tests damaged configuration, tokenizer and data files: accepted, or refused in one line.

They must never raise another exception, execute code, or read a file outside the folder.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_chatflow.config import RunConfig, load_config, load_config_from_argv
from megatron_chatflow.config.flags import FLAGS
from megatron_chatflow.config.yaml_file import parse_yaml
from megatron_chatflow.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer import load_tokenizer

FUZZ = settings(
    max_examples=80,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SECTIONS = ("model", "tokenizer", "parallel", "data", "optimizer", "train", "checkpoint", "logging")
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["../../x", "/dev/null", "5M", "1e999", "nan", "\u202e", "!!python/object"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
HOSTILE = ("nan", "1e999", "9" * 5000, "-1", "../../x", "/dev/null", "!!python/name:os", "\ud800")
FIELDS = st.sampled_from(sorted({flag.field for flag in FLAGS} | {"sources", "schedule"}))


def refused(call, *arguments) -> bool:
    """Returns whether the call raises a `UserError`. Any other exception fails the test."""
    try:
        call(*arguments)
    except UserError as error:
        assert len(str(error)) < 10_000 and "\n" not in str(error)
        return True
    return False


@FUZZ
@given(st.binary(max_size=200) | st.text(alphabet="-:[]{}&*!|>%@`'\",# \n\tab<1.e", max_size=60))
def test_any_bytes_as_yaml(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refused(load_config, path)  # A random file is never a complete configuration.


@FUZZ
@given(st.dictionaries(st.sampled_from(SECTIONS), st.dictionaries(FIELDS, VALUES) | VALUES))
def test_any_values_as_a_configuration(values: dict) -> None:
    assert refused(RunConfig.from_dict, values)


@FUZZ
@given(st.lists(st.sampled_from([f.name for f in FLAGS]) | st.text(max_size=9), max_size=6))
def test_any_arguments(arguments: list[str]) -> None:
    try:
        assert refused(load_config_from_argv, arguments)
    except SystemExit as answered:
        assert answered.code == 0 and {"-h", "--help"} & set(arguments)


@FUZZ
@given(st.sampled_from([f.name for f in FLAGS]), st.text(max_size=9) | st.sampled_from(HOSTILE))
def test_any_value_of_a_flag(name: str, value: str) -> None:
    # A single flag is never a complete configuration.
    assert refused(load_config, None, [name, value])


@pytest.mark.parametrize(
    "text",
    [
        "model: !!python/object/apply:os.system ['touch planted']",
        "model: !!python/object/new:pathlib.Path [planted]",
        "model: !!python/name:os.system",
        "model: {num_layers: .nan}",
        "model: {num_layers: %s}" % ("9" * 5000),
        "optimizer: {lr: .nan}",
        "a: &a {<<: *a}",
        "[" * 20_000,
        "{a: " * 20_000,
    ],
    ids=lambda text: text[:30],
)
def test_hostile_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(load_text, text)
    assert not list(tmp_path.iterdir())


def test_merged_keys_are_overridden_and_repeated_ones_refused() -> None:
    text = "a: &a {k: 1, l: 2}\nb: &b {<<: *a, l: 3}\nc: {<<: [*b, *a], k: 4}"
    assert parse_yaml(text, "x")["c"] == {"k": 4, "l": 3}
    assert refused(parse_yaml, "a: &a {k: 1, k: 2}\nb: {<<: *a}", "x")


def test_aliases_do_not_multiply() -> None:
    """A "billion laughs" file: nine levels of nine aliases would make 387 million entries.

    They stand in the value of a known field, which the message prints.
    """
    levels = ["&a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    for k in range(1, 30):
        levels.append(f"&a{k} [{', '.join([f'*a{k - 1}'] * 9)}]")
    with pytest.raises(UserError, match=r"^model\.num_layers: must be .* not \[\[") as caught:
        load_text(f"model: {{preset: tiny, num_layers: [{', '.join(levels)}]}}")
    assert len(str(caught.value)) < 2000


def test_merged_aliases_do_not_multiply() -> None:
    lines = ["a0: &a0 {k: 1}"]
    for k in range(1, 40):
        lines.append(f"a{k}: &a{k} {{<<: [{', '.join([f'*a{k - 1}'] * 9)}]}}")
    assert parse_yaml("\n".join(lines), "x")["a39"] == {"k": 1}


def load_text(text: str) -> RunConfig:
    return RunConfig.from_dict(parse_yaml(text, "bomb.yaml"))


@FUZZ
@given(st.binary(max_size=300))
def test_any_bytes_as_a_tokenizer(tmp_path: Path, content: bytes) -> None:
    for name in ("tokenizer.model", "tokenizer.json"):
        path = tmp_path / name
        path.write_bytes(content)
        assert refused(load_tokenizer, path)


@FUZZ
@given(st.dictionaries(st.sampled_from(["model", "version", "added_tokens", "decoder"]), VALUES))
def test_any_json_as_a_tokenizer(tmp_path: Path, content: dict) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    assert refused(load_tokenizer, path)


def cuts(low: int, num_bytes: int) -> st.SearchStrategy[int]:
    """Lengths of a file cut short, and as often the whole length."""
    return st.just(num_bytes) | st.integers(low, num_bytes)


@FUZZ
@given(st.data())
def test_a_tokenizer_with_flipped_bytes(
    tmp_path: Path, tiny_sentencepiece_model: Path, data: st.DataObject
) -> None:
    content = bytearray(tiny_sentencepiece_model.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "tokenizer.model"
    path.write_bytes(bytes(content[: data.draw(cuts(1, len(content)))]))
    refused(lambda: load_tokenizer(path).encode("some text"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("data") / "made_text_document"
    writer = IndexedDatasetWriter(prefix, np.uint16)
    for k in range(20):
        writer.add_document(np.arange(k + 1, dtype=np.uint16))
    writer.finalize()
    return prefix


@FUZZ
@given(st.data())
def test_an_idx_with_flipped_bytes(dataset: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(Path(f"{dataset}.idx").read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    prefix = tmp_path / "damaged_text_document"
    shutil.copy(f"{dataset}.bin", f"{prefix}.bin")
    Path(f"{prefix}.idx").write_bytes(bytes(content[: data.draw(cuts(0, len(content)))]))

    def read() -> None:
        damaged = IndexedDataset(prefix)
        for k in range(len(damaged)):
            assert len(damaged[k]) <= 210

    refused(read)
