"""Compares every family of models with transformers: conversion, logits, and updates.

The logits and the step of every family are those of `tools/check_architectures.py`. The updates are
those of the real trainer, the first from ``--load-hf`` and the second after a resume at another
layout, on a dataset of a single sample; transformers computes the same gradients and PyTorch's
AdamW the same updates. The models have 3 query groups, so that two tensor-parallel ranks need
padded heads.
"""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest
import torch
import yaml
from family_tokenizers import make_folder
from fork_server import run_tool
from tiny_run import TinyRun

from megatron_chatflow.checkpoint.index import read_index
from megatron_chatflow.convert.from_huggingface import import_huggingface
from megatron_chatflow.convert.merge import merge_models
from megatron_chatflow.convert.resize import resize_checkpoint
from megatron_chatflow.convert.safetensors import HuggingFaceWeights
from megatron_chatflow.convert.template import TokenizerChoice
from megatron_chatflow.convert.to_huggingface import export_checkpoint
from megatron_chatflow.convert.vocabulary import Resize
from megatron_chatflow.data.indexed import IndexedDatasetWriter
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.extend import extend_tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "check_architectures.py"
_spec = importlib.util.spec_from_file_location("check_architectures", TOOL)
assert _spec is not None and _spec.loader is not None
tool: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tool)

NAMES = tuple(tool.MODELS)
LENGTH, LR, DECAY, EPSILON = 32, 0.05, 0.5, 0.01
SMALL: dict[str, dict[str, Any]] = {
    "qwen2": tool.model_values("qwen2", 48, 80, (6, 3), tie_word_embeddings=True),
    "qwen3": tool.model_values("qwen3", 48, 80, (6, 3), head_dim=12),
    "mistral": tool.model_values(
        "mistral", 48, 80, (6, 3), sliding_window=9, rope_parameters=tool.YARN
    ),
}
TP2 = ["--tensor-model-parallel-size", 2, "--pad-attention-heads"]
PP2 = ["--pipeline-model-parallel-size", 2, "--num-virtual-stages-per-pipeline-rank", 2]
SEQUENCE = [*TP2, "--sequence-parallel"]
SHARDED = ["--use-distributed-optimizer"]
PIECES = ["\u4eba\u5de5", "\u673a\u5668\u5b66\u4e60", "\u6c34"]
STAND_IN = "transformer_engine"  # both iterations with the stand-in of transformer-engine
# The layouts of the first and of the second iteration, which is another run that resumes.
LAYOUTS: dict[str, tuple[list[object], list[object]]] = {
    "sequence": ([*SEQUENCE, *SHARDED, "--ema-decay", 0.5], PP2),
    "context": (["--context-parallel-size", 2, *SHARDED], [*TP2, "--log-layer-norms"]),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Converts small models, and compares their logits at every layout."""
    folder = tmp_path_factory.mktemp("architectures")
    found: dict[str, Any] = tool.check(
        folder, lambda *arguments: jobs.run_ranks(2, TOOL, *arguments), NAMES
    )
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
def test_conversion_logits_growth_and_a_step_are_those_of_transformers(
    results: dict[str, Any], name: str
) -> None:
    result = results[name]
    assert result.is_exact and result.is_grown
    assert result.largest_logit > 1
    expected = {*tool.LAYOUTS, tool.PADDED, tool.KV_CACHE, tool.BF16}
    if tool.MODELS[name].get("sliding_window") is not None:
        expected.add(tool.AROUND)
    assert result.differences.keys() == expected
    assert 1e-3 < result.differences.pop(tool.BF16) < 0.1 * result.largest_logit
    for column, difference in result.differences.items():
        assert difference < 1e-4, column
    assert result.step < 2e-5


def test_every_supported_class_is_compared() -> None:
    from megatron_chatflow.config.architectures import ARCHITECTURES

    assert {model["model_type"] for model in tool.MODELS.values()} == set(ARCHITECTURES)


def sample() -> torch.Tensor:
    """Returns the ids of the only sample, int64[LENGTH + 1]."""
    return torch.randint(3, 600, (LENGTH + 1,), generator=torch.Generator().manual_seed(5))


def grow_bytes(root: Path) -> list[object]:
    """Writes a Qwen3 with a larger byte-level vocabulary; returns the command of its training.

    The model has more rows than the new tokenizer has tokens, as the published ones.
    """
    old = make_folder(root / "bytes", "qwen")
    tool.save_model(root / "bytes", SMALL["qwen3"])
    new = extend_tokenizer(old, PIECES, root / "bytes_extended", "merges")
    import_huggingface(root / "bytes", root / "bytes_grown", resize=Resize(new))
    export_checkpoint(root / "bytes_grown", root / "bytes_hf")
    writer = IndexedDatasetWriter(root / "bytes_document", np.uint16)
    ids = [new.vocab_size - 1 - k for k in range(LENGTH + 1)]
    writer.add_document(np.array(ids, dtype=np.uint16))
    writer.finalize()
    config = yaml.safe_load((root / "qwen3.yaml").read_text())
    config["tokenizer"]["tokenizer_model"] = str(new.model_path.parent)
    config["data"]["sources"]["text"]["paths"] = [str(root / "bytes_document")]
    config["train"]["train_iters"] = 1
    config["checkpoint"]["load_hf"] = str(root / "bytes_hf")
    (root / "bytes.yaml").write_text(yaml.safe_dump(config))
    return ["--config", root / "bytes.yaml", *TP2, "--save", root / "bytes_run"]


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains every model for one iteration at every layout."""
    root = tmp_path_factory.mktemp("updates")
    writer = IndexedDatasetWriter(root / "text_document", np.uint16)
    writer.add_document(sample().numpy().astype(np.uint16))
    writer.finalize()
    tasks: list[list[object]] = []
    for kind, values in SMALL.items():
        tool.save_model(root / kind, values)
        config = {
            "tokenizer": {"tokenizer_model": str(tiny_run.tokenizer_model)},
            "data": {
                "seq_length": LENGTH,
                "sources": {"text": {"paths": [str(root / "text_document")]}},
            },
            "train": {"train_iters": 2, "global_batch_size": 4, "micro_batch_size": 1},
            "optimizer": {"lr": LR, "min_lr": LR, "weight_decay": DECAY, "adam_eps": EPSILON},
            "checkpoint": {"load_hf": str(root / kind)},
            "logging": {"log_params_norm": True},
        }
        config["train"]["bf16"] = False  # type: ignore[index]
        (root / f"{kind}.yaml").write_text(yaml.safe_dump(config))
        for name, (first, second) in LAYOUTS.items():
            run = root / f"{kind}_{name}"
            command = ["--config", root / f"{kind}.yaml", "--save", run, "--load", run]
            tasks += [[*command, *first, "--exit-interval", 1], [*command, *second]]
    config["checkpoint"] = {"load_hf": str(root / "qwen2")}
    config["train"]["stages"] = [{"at": 0, "trainable": ["*.linear_qkv.bias"]}]  # type: ignore[index]
    (root / "biases.yaml").write_text(yaml.safe_dump(config))
    tasks.append(["--config", root / "biases.yaml", *TP2, "--save", root / "biases"])
    tasks.append(grow_bytes(root))
    jobs.run_layouts(2, tasks, root)  # type: ignore[arg-type]
    jobs.run_with_stand_in(
        2,
        [
            ["--config", root / f"{kind}.yaml", "--save", root / f"{kind}_{STAND_IN}", *SEQUENCE]
            for kind in SMALL
        ],
        root,
    )
    return root


def trained(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Returns the weights after two updates of transformers and AdamW, and what a run logs."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    parameters, ids = list(model.parameters()), sample()
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=EPSILON)
    logged = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids[None, :-1]).logits[0], ids[1:])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        size = sum(float(p.detach().double().square().sum()) for p in parameters) ** 0.5
        logged.append(
            {"lm_loss": float(loss.detach()), "grad_norm": float(norm), "params_norm": size}
        )
    return dict(model.state_dict()), logged


@pytest.mark.distributed
@pytest.mark.parametrize("kind", SMALL)
def test_updates_are_those_of_transformers_and_adamw(runs: Path, kind: str, tmp_path: Path) -> None:
    expected, logged = trained(runs / kind)
    before = HuggingFaceWeights(runs / kind)
    for layout in (*LAYOUTS, STAND_IN):
        run = runs / f"{kind}_{layout}"
        export_checkpoint(run, tmp_path / layout, tokenizer=TokenizerChoice(leave_out=True))
        after = HuggingFaceWeights(tmp_path / layout)
        assert after.files.keys() == before.files.keys()
        for name in after.files:
            weight = after.read(name)
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-5, msg=name + layout)
            assert (weight - before.read(name)).abs().max() > 1e-3, name
        found, _ = jobs.read_metrics(run)
        for ours, theirs in zip(found, logged, strict=True):
            for name, value in theirs.items():
                assert ours[name] == pytest.approx(value, rel=2e-5), name


@pytest.mark.distributed
@pytest.mark.parametrize("kind", SMALL)
def test_a_larger_vocabulary_and_a_merge(
    runs: Path, kind: str, tiny_run: TinyRun, tmp_path: Path
) -> None:
    """Growth, with rows that are fitted through transformers, and the mean of two models."""
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(runs / kind, tmp_path / "hf")
    old = load_tokenizer(tiny_run.tokenizer_model)
    old.save_pretrained(folder)
    new = extend_tokenizer(old, [chr(0x6000 + k) for k in range(60)], tmp_path / "extended")
    texts = [chr(0x6000 + k) * 2 + chr(0x6000 + 2 * k % 60) for k in range(20)]
    resize = Resize(new, "distill", distill_text=texts, distill_tokens=100)
    import_huggingface(folder, tmp_path / "grown", resize=resize)
    export_checkpoint(tmp_path / "grown", tmp_path / "back")
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before, after = HuggingFaceWeights(folder), HuggingFaceWeights(tmp_path / "back")
    for name in before.files:
        assert torch.equal(after.read(name)[: before.shape(name)[0]][:600], before.read(name)[:600])
    assert after.shape("model.embed_tokens.weight")[0] == 660
    run = runs / f"{kind}_context"
    merge_models([runs / kind, run], tmp_path / "mean")
    export_checkpoint(run, tmp_path / "run", tokenizer=TokenizerChoice(leave_out=True))
    mean, other = HuggingFaceWeights(tmp_path / "mean"), HuggingFaceWeights(tmp_path / "run")
    for name in before.files:
        expected = (before.read(name) + other.read(name)) / 2
        torch.testing.assert_close(mean.read(name), expected)


def check_verify(folder: Path, checkpoint: Path) -> None:
    """Checks that ``verify`` finds an exported folder and its checkpoint to be the same model."""
    done = run_tool("convert_checkpoint.py", "verify", "--hf", folder, "--checkpoint", checkpoint)
    assert done.returncode == 0, done.stderr
    assert "same model" in done.stdout


@pytest.mark.distributed
def test_a_byte_level_vocabulary_grows_in_surplus_rows(runs: Path, tmp_path: Path) -> None:
    """Extension, import, training and export of a Qwen3, and a second extension of the run."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export_checkpoint(runs / "bytes_run", tmp_path / "hf")
    old, new = (load_tokenizer(runs / name) for name in ("bytes", "bytes_extended"))
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = f"a{''.join(PIECES)} b"
    assert theirs(text)["input_ids"] == new.encode(text)
    assert max(new.encode(text)) >= old.vocab_size
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.config.vocab_size == len(model.lm_head.weight) == 613 > new.vocab_size
    before, after = HuggingFaceWeights(runs / "bytes"), HuggingFaceWeights(tmp_path / "hf")
    rows = [weights.read("model.embed_tokens.weight") for weights in (before, after)]
    changed = (rows[0] != rows[1]).any(dim=1)
    assert changed[old.vocab_size : new.vocab_size].all()
    wider = extend_tokenizer(new, ["\u9f98"], tmp_path / "wider", "merges")
    resize_checkpoint(runs / "bytes_run", tmp_path / "wider_run", Resize(wider))
    export_checkpoint(tmp_path / "wider_run", tmp_path / "wider_hf")
    check_verify(tmp_path / "wider_hf", tmp_path / "wider_run")


@pytest.mark.distributed
def test_a_window_survives_resize_and_verify(runs: Path, tiny_run: TinyRun, tmp_path: Path) -> None:
    old = load_tokenizer(tiny_run.tokenizer_model)
    new = extend_tokenizer(old, [chr(0x6000 + k) for k in range(60)], tmp_path / "extended")
    resize_checkpoint(runs / "mistral_context", tmp_path / "run", Resize(new))
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["sliding_window"] == 9 and config["vocab_size"] == 660
    check_verify(tmp_path / "hf", tmp_path / "run")


@pytest.mark.distributed
def test_a_stage_may_train_only_biases(runs: Path, tmp_path: Path) -> None:
    export_checkpoint(runs / "biases", tmp_path / "hf", tokenizer=TokenizerChoice(leave_out=True))
    before, after = HuggingFaceWeights(runs / "qwen2"), HuggingFaceWeights(tmp_path / "hf")
    for name in before.files:
        assert torch.equal(before.read(name), after.read(name)) != name.endswith(".bias"), name
    index = read_index(runs / "biases" / "iter_0000002").state_dict_metadata
    stored = index["decoder.layers.self_attention.linear_qkv.bias"]
    assert tuple(stored.size) == (4, 12 * 8), "padding heads are left out"
