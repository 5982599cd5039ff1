"""Tests that fp32 master weights start from the initial weights in full precision, not rounded.

The learning rate of the first iteration is 0, so the run saves exactly what it loaded.
"""

import shutil
from pathlib import Path

import jobs
import pytest
import torch
import yaml
from tiny_run import TinyRun

from megatron_chatflow.convert.from_huggingface import import_huggingface
from megatron_chatflow.convert.safetensors import HuggingFaceWeights
from megatron_chatflow.convert.to_huggingface import export_checkpoint
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.extend import extend_tokenizer

SHARDED = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
TENSOR = ["--tensor-model-parallel-size", "2"]
PIPELINE = ["--pipeline-model-parallel-size", "2"]
VIRTUAL = [*PIPELINE, "--num-virtual-stages-per-pipeline-rank", "2"]
PADDED = ["--pad-attention-heads", "--num-attention-heads", "3", "--num-query-groups", "3"]
LAYOUTS = {
    1: {"one": []},
    2: {
        "dp_sharded": SHARDED,
        "tp": TENSOR,
        "tp_sharded": [*TENSOR, *SHARDED, "--sequence-parallel"],
        "pp": PIPELINE,
        "virtual_sharded": [*VIRTUAL, *SHARDED, "--micro-batch-size", "1"],
    },
}
SOURCES = {
    "hf_fp32": "--load-hf",
    "hf_fp16": "--load-hf",
    "imported_fp32": "--pretrained-checkpoint",
    "imported_fp16": "--pretrained-checkpoint",
    "bf16_run": "--pretrained-checkpoint",
}
NAMES = [
    f"{layout}_{source}"
    for of in LAYOUTS.values()
    for layout in of
    for source in SOURCES
    if layout == "one" or not source.endswith("fp16")
]
NEW = [chr(0x6000 + 13 * k) for k in range(60)]


@pytest.fixture(scope="module")
def folder(tiny_run: TinyRun) -> Path:
    """Trains a run in fp32 and one in bf16, exports both, and imports the exports of the first."""
    root = tiny_run.folder / "master_weights"
    root.mkdir()
    base = ["--config", tiny_run.config, "--train-iters", 2]
    jobs.run(jobs.pretrain(*base, "--save", root / "fp32_run"))
    jobs.run(jobs.pretrain(*base, "--bf16", "--save", root / "bf16_run"))
    export_checkpoint(root / "bf16_run", root / "hf_bf16_run", dtype="fp32")
    for dtype in ("fp32", "fp16"):
        export_checkpoint(root / "fp32_run", root / f"hf_{dtype}", dtype=dtype)
        import_huggingface(root / f"hf_{dtype}", root / f"imported_{dtype}")
    return root


@pytest.fixture(scope="module")
def runs(folder: Path, tiny_run: TinyRun) -> Path:
    """Trains one iteration in bf16 from every source in every layout."""
    base = ["--config", tiny_run.config, "--bf16", "--exit-interval", 1, "--eval-interval", 100]
    for num_processes, layouts in LAYOUTS.items():
        tasks = [
            [*base, *flags, option, folder / source, "--save", folder / f"{layout}_{source}"]
            for layout, flags in layouts.items()
            for source, option in SOURCES.items()
            if f"{layout}_{source}" in NAMES
        ]
        jobs.run_layouts(num_processes, tasks, folder)  # type: ignore[arg-type]
    return folder


def assert_equal(run: Path, expected: Path, scratch: Path) -> None:
    """Compares a run's master weights and bf16 weights with a Hugging Face folder."""
    export_checkpoint(run, scratch / "fp32", dtype="fp32")
    export_checkpoint(run, scratch / "bf16")
    masters, weights = (HuggingFaceWeights(scratch / name) for name in ("fp32", "bf16"))
    wanted = HuggingFaceWeights(expected)
    for name in wanted.files:
        right = wanted.read(name).float()
        found = masters.read(name)
        assert torch.equal(found[: len(right)], right), name
        assert torch.equal(weights.read(name), found.bfloat16()), name


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
def test_master_weights_are_the_source(runs: Path, tmp_path: Path, name: str) -> None:
    source = next(source for source in SOURCES if name.endswith(source))
    expected = runs / source.replace("imported", "hf").replace("bf16_run", "hf_bf16_run")
    assert_equal(runs / name, expected, tmp_path)


@pytest.mark.distributed
@pytest.mark.parametrize("begin", ["--load-hf", "--pretrained-checkpoint"])
def test_with_a_larger_vocabulary(
    folder: Path, tiny_run: TinyRun, tmp_path: Path, begin: str
) -> None:
    new = extend_tokenizer(load_tokenizer(tiny_run.tokenizer_model), NEW, tmp_path / "tokenizer")
    source = folder / ("hf_fp32" if begin == "--load-hf" else "imported_fp32")
    run = ["--config", tiny_run.config, "--bf16", "--exit-interval", 1, begin, source, "--save"]
    run += [tmp_path / "run", "--tokenizer-model", new.model_path]
    jobs.run(jobs.pretrain(*run, "--embedding-init", "mean-of-pieces"))
    assert_equal(tmp_path / "run", folder / "hf_fp32", tmp_path)
    rows = HuggingFaceWeights(tmp_path / "fp32").read("model.embed_tokens.weight")[600:]
    assert len(rows) == 60 and not torch.equal(rows, rows.bfloat16().float())


@pytest.mark.distributed
def test_padded_heads(folder: Path, tiny_run: TinyRun, tmp_path: Path) -> None:
    base = ["--config", tiny_run.config, "--exit-interval", 1, *PADDED, "--kv-channels", 16]
    jobs.run(jobs.pretrain(*base, "--save", tmp_path / "start"))
    export_checkpoint(tmp_path / "start", tmp_path / "hf", dtype="fp32")
    import_huggingface(tmp_path / "hf", tmp_path / "imported")
    tasks = [
        [*base, "--bf16", *TENSOR, option, tmp_path / source, "--save", tmp_path / f"from_{source}"]
        for option, source in (("--load-hf", "hf"), ("--pretrained-checkpoint", "imported"))
    ]
    jobs.run_layouts(2, tasks, tmp_path)  # type: ignore[arg-type]
    for source in ("hf", "imported"):
        (tmp_path / f"scratch_{source}").mkdir()
        assert_equal(tmp_path / f"from_{source}", tmp_path / "hf", tmp_path / f"scratch_{source}")


@pytest.mark.distributed
@pytest.mark.parametrize("begin", ["--load", "--pretrained-checkpoint"])
def test_an_fp32_run_takes_a_bf16_runs_master_weights(
    folder: Path, tiny_run: TinyRun, tmp_path: Path, begin: str
) -> None:
    values = yaml.safe_load(tiny_run.config.read_text())
    # The resume continues with its third iteration, at a learning rate that changes no weight.
    values["optimizer"] |= {"lr": 1e-30, "min_lr": 0.0, "weight_decay": 0.0}
    values["train"]["train_iters"] = 3
    config = tmp_path / "still.yaml"
    config.write_text(yaml.safe_dump(values))
    start = folder / "bf16_run"
    if begin == "--load":
        start = Path(shutil.copytree(start, tmp_path / "run"))
    flags = ["--config", config, begin, start, "--save", tmp_path / "run", "--exit-interval", 1]
    jobs.run_layouts(2, [[*flags, *SHARDED]], tmp_path)  # type: ignore[arg-type]
    export_checkpoint(tmp_path / "run", tmp_path / "fp32", dtype="fp32")
    found = HuggingFaceWeights(tmp_path / "fp32")
    wanted = HuggingFaceWeights(folder / "hf_bf16_run")
    for name in wanted.files:
        assert torch.equal(found.read(name), wanted.read(name)), name
