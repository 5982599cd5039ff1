"""Tests whether texts begin with BOS: sources of the setting, its record, export, warnings."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_run import TinyRun
from tiny_shape import SHAPE_OF_TINY_RUN

from megatron_chatflow.checkpoint.files import read_state, resolve_checkpoint
from megatron_chatflow.convert.from_huggingface import import_huggingface
from megatron_chatflow.convert.shape import huggingface_config
from megatron_chatflow.convert.to_huggingface import export_checkpoint
from megatron_chatflow.convert.weight_map import huggingface_shapes
from megatron_chatflow.preprocess import PreprocessSettings, preprocess
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.extend import extend_tokenizer
from megatron_chatflow.training.inputs import RunInputs, open_inputs

WARNING = "do not start with BOS, but this model expects it"


@pytest.fixture(scope="module")
def datasets(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Creates the same documents with and without BOS."""
    folder = tmp_path_factory.mktemp("begun")
    lines = [json.dumps({"text": f"ab cd {k} " * 40}) for k in range(60)]
    (folder / "in.jsonl").write_text("\n".join(lines))
    prefixes = {}
    for name, append_bos in {"begun": True, "plain": False}.items():
        settings = PreprocessSettings(
            inputs=(str(folder / "in.jsonl"),),
            output_prefix=str(folder / name),
            tokenizer_model=str(tiny_run.tokenizer_model),
            append_bos=append_bos,
            append_eod=True,
        )
        preprocess(settings)
        prefixes[name] = f"{folder / name}_text_document"
    return prefixes


def sources_of(datasets: dict[str, str], *names: str) -> dict[str, dict[str, list[str]]]:
    return {name: {"paths": [datasets[name]]} for name in names}


def knots_of(*names: str) -> list[dict[str, object]]:
    return [{"at": 0, "weights": dict.fromkeys(names, 1 / len(names))}]


def make_model(folder: Path, tiny_run: TinyRun, *, add_bos_token: bool) -> Path:
    shape = SHAPE_OF_TINY_RUN
    tokenizer = load_tokenizer(tiny_run.tokenizer_model)
    tokenizer.save_pretrained(folder, add_bos_token=add_bos_token)
    tensors = {name: torch.ones(size) for name, size in huggingface_shapes(shape).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = huggingface_config(shape, torch.float32, {})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def exported(inputs: RunInputs, checkpoint: Path, output: Path) -> bool:
    """Returns whether an export of this run would prepend BOS to texts."""
    folder = resolve_checkpoint(checkpoint)
    assert folder is not None
    state = json.dumps({**read_state(folder), "tokenizer": inputs.state.tokenizer})
    (folder / "state.json").write_text(state)
    export_checkpoint(checkpoint, output)
    return load_tokenizer(output).add_bos_token


@pytest.mark.parametrize("names", [("plain",), ("begun",), ("begun", "plain")])
def test_documents_with_bos_make_texts_begin_with_it(
    names: tuple[str, ...],
    make_config,
    datasets: dict[str, str],
    tiny_run: TinyRun,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = make_config(
        data__sources=sources_of(datasets, *names), data__schedule__knots=knots_of(*names)
    )
    inputs = open_inputs(config)
    assert inputs.state.tokenizer["add_bos_token"] is ("begun" in names)
    assert (WARNING in caplog.text) == (len(names) == 2)
    assert len(names) < 2 or "documents of plain do not" in caplog.text
    make_model(tmp_path / "hf", tiny_run, add_bos_token=False)
    import_huggingface(tmp_path / "hf", tmp_path / "run")
    assert exported(inputs, tmp_path / "run", tmp_path / "export") is ("begun" in names)


def test_the_setting_of_the_base_is_kept(
    make_config, tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = make_model(tmp_path / "hf", tiny_run, add_bos_token=True)
    import_huggingface(base, tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "untrained")
    assert load_tokenizer(tmp_path / "untrained").add_bos_token

    # The run's tokenizer is a bare model file without the setting. The weights' tokenizer has it.
    assert not load_tokenizer(tiny_run.tokenizer_model).add_bos_token
    for begin in (
        {"checkpoint__load": str(tmp_path / "run"), "checkpoint__finetune": True},
        {"checkpoint__load_hf": str(base)},
    ):
        inputs = open_inputs(make_config(**begin))
        assert inputs.state.tokenizer["add_bos_token"] is True
        assert WARNING in caplog.text
        caplog.clear()
    assert exported(inputs, tmp_path / "run", tmp_path / "export")

    # An extended vocabulary begins texts as the old one did.
    grown = extend_tokenizer(load_tokenizer(base), ["龍"], tmp_path / "grown")
    assert grown.add_bos_token == load_tokenizer(tmp_path / "grown").add_bos_token is True


def test_checkpoints_of_earlier_versions_say_nothing(tiny_run: TinyRun, tmp_path: Path) -> None:
    base = make_model(tmp_path / "hf", tiny_run, add_bos_token=False)
    import_huggingface(base, tmp_path / "run")
    folder = resolve_checkpoint(tmp_path / "run")
    assert folder is not None
    state = read_state(folder)
    assert state["tokenizer"].pop("add_bos_token") is False
    (folder / "state.json").write_text(json.dumps(state))
    export_checkpoint(tmp_path / "run", tmp_path / "export")
    assert not load_tokenizer(tmp_path / "export").add_bos_token
