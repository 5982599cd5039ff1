"""Tests training directly from a Hugging Face folder, and vocabulary growth while weights load."""

import json
import shutil
from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny_run import TinyRun, made_up_sentences, write_dataset
from tiny_shape import SHAPE_OF_TINY_RUN
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_chatflow.convert.distributed import DistributedReader
from megatron_chatflow.convert.from_huggingface import import_huggingface
from megatron_chatflow.convert.grown_reader import GrownReader
from megatron_chatflow.convert.safetensors import HuggingFaceWeights
from megatron_chatflow.convert.shape import huggingface_config
from megatron_chatflow.convert.to_huggingface import export_checkpoint
from megatron_chatflow.convert.vocabulary import (
    GrownVocabulary,
    Resize,
    grow_rows,
    vocabulary_growth,
)
from megatron_chatflow.convert.weight_map import huggingface_shapes
from megatron_chatflow.data.indexed import IndexedDatasetWriter
from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.extend import extend_tokenizer

LAYOUTS: dict[str, list[str]] = {
    "tp1": [],
    "tp2": ["--tensor-model-parallel-size", "2"],
    "pp2": ["--pipeline-model-parallel-size", "2"],
    "virtual": [
        *("--pipeline-model-parallel-size", "2"),
        *("--num-virtual-stages-per-pipeline-rank", "2"),
    ],
}
RESUMED = {
    "tp2": LAYOUTS["tp2"],
    "pp2": LAYOUTS["pp2"],
    "dp2": [],
}
# 600 pieces become 660, which also changes the padding.
NEW = [chr(0x6000 + 13 * k) for k in range(60)]
EMBEDDING = "embedding.word_embeddings.weight"


def write_grown_dataset(prefix: Path, tokenizer_model: Path, num_documents: int) -> None:
    """Writes documents in which every other word is one of the new characters."""
    tokenizer = load_tokenizer(tokenizer_model)
    writer = IndexedDatasetWriter(prefix, np.uint16)
    for number, text in enumerate(made_up_sentences(num_documents, seed=4)):
        words = text.split()
        mixed = "".join(w + NEW[(number + k) % 60] for k, w in enumerate(words))
        writer.add_document(np.array([*tokenizer.encode(mixed), tokenizer.eos_id], np.uint16))
    writer.finalize()


@pytest.fixture(scope="module")
def folder(tiny_run: TinyRun) -> Path:
    """Trains a bf16 run of two iterations, exports it, and imports it with both vocabularies."""
    root = tiny_run.folder / "load_hf"
    root.mkdir()
    run = ["--config", tiny_run.config, "--train-iters", 2, "--bf16", "--save", root / "start"]
    jobs.run(jobs.pretrain(*run))
    export_checkpoint(root / "start", root / "hf")
    import_huggingface(root / "hf", root / "imported")
    old = load_tokenizer(tiny_run.tokenizer_model)
    new = extend_tokenizer(old, NEW, root / "extended")
    import_huggingface(root / "hf", root / "imported_grown", resize=Resize(new, "normal"))
    write_dataset(root / "first_text_document", new.model_path, seed=2, num_documents=300)
    write_grown_dataset(root / "second_text_document", new.model_path, 300)
    values = yaml.safe_load(tiny_run.config.read_text())
    values["train"]["train_iters"] = 3
    grown = yaml.safe_load(tiny_run.config.read_text())
    grown["train"]["train_iters"] = 4
    grown["tokenizer"]["tokenizer_model"] = str(new.model_path)
    for name, source in grown["data"]["sources"].items():
        source["paths"] = [str(root / f"{name}_text_document")]
    (root / "grown.yaml").write_text(yaml.safe_dump(grown))
    (root / "full.yaml").write_text(yaml.safe_dump(values))
    for config in (values, grown):  # The model shape comes from the folder alone.
        del config["model"]
    (root / "bare.yaml").write_text(yaml.safe_dump(values))
    (root / "grown_bare.yaml").write_text(yaml.safe_dump(grown))
    return root


@pytest.fixture(scope="module")
def runs(folder: Path) -> Path:
    """Trains all runs of this file, those of a layout in the same processes."""
    for name, layout in LAYOUTS.items():
        flags = [*layout, "--save"]
        full, bare = ["--config", folder / "full.yaml"], ["--config", folder / "bare.yaml"]
        grown = ["--config", folder / "grown.yaml", "--pretrained-checkpoint"]
        direct = ["--config", folder / "grown_bare.yaml", "--load-hf", folder / "hf"]
        imported = ["--pretrained-checkpoint", folder / "imported"]
        init = ["--embedding-init", "normal"]
        tasks: list[list[object]] = [
            [*full, *imported, *flags, folder / f"{name}_imported"],
            [*bare, "--load-hf", folder / "hf", *flags, folder / f"{name}_direct"],
            [*grown, folder / "imported_grown", *flags, folder / f"{name}_grown_imported"],
            [*direct, *init, *flags, folder / f"{name}_grown_direct"],
        ]
        jobs.run_layouts(1 if name == "tp1" else 2, tasks, folder)  # type: ignore[arg-type]
    again = ["--config", folder / "grown.yaml", "--bf16", "--embedding-init", "mean-of-pieces"]
    for names in (["tp1"], list(RESUMED)):
        tasks = []
        for name in names:
            run = shutil.copytree(folder / "start", folder / f"{name}_resumed")
            tasks.append([*again, *RESUMED.get(name, []), "--save", run, "--load", run])
        jobs.run_layouts(1 if names == ["tp1"] else 2, tasks, folder)  # type: ignore[arg-type]
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["", "grown_"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_equal_those_from_an_imported_checkpoint(runs: Path, layout: str, kind: str) -> None:
    expected, expected_validation = jobs.read_metrics(runs / f"{layout}_{kind}imported")
    found, found_validation = jobs.read_metrics(runs / f"{layout}_{kind}direct")
    assert len(found) == len(expected) == (4 if kind else 3)
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("batch_digest", "lm_loss", "grad_norm"):
            assert ours[name] == theirs[name]
    assert found_validation == expected_validation


@pytest.mark.distributed
@pytest.mark.parametrize("layout", RESUMED)
def test_a_run_goes_on_with_a_larger_vocabulary_at_any_layout(runs: Path, layout: str) -> None:
    expected, _ = jobs.read_metrics(runs / "tp1_resumed")
    found, _ = jobs.read_metrics(runs / f"{layout}_resumed")
    assert [entry["iteration"] for entry in found] == [1, 2, 3, 4]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["batch_digest"] == theirs["batch_digest"]
        # bf16 keeps 8 bits of each product's result, so sums split differently differ by that much.
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], rel=4e-3)
    reader = DistributedReader(runs / f"{layout}_resumed" / "iter_0000004")
    assert tuple(reader.tensors[EMBEDDING].size) == (768, 64)
    assert not reader.read_whole(EMBEDDING)[660:].any(), "padding rows learn nothing"


@pytest.mark.distributed
def test_grown_tensors_are_what_was_stored_and_made(folder: Path) -> None:
    checkpoint = folder / "start" / "iter_0000002"
    stored = DistributedReader(checkpoint)
    new = load_tokenizer(folder / "extended")
    old = load_tokenizer(folder / "hf")
    growth = vocabulary_growth(old, new, 600)
    grown = GrownVocabulary(growth, Resize(new, "mean-of-pieces"), 600)
    optimizer = ("fp32_param", "exp_avg", "exp_avg_sq")
    prefixes = ("", *(f"optimizer.state.{kind}." for kind in optimizer))
    state = {
        prefix + EMBEDDING: torch.full(
            (768, 64), 7.0, dtype=torch.float32 if prefix else torch.bfloat16
        )
        for prefix in prefixes
    }
    load(
        state,
        storage_reader=GrownReader(checkpoint, grown, 768),
        planner=DefaultLoadPlanner(),
        no_dist=True,
    )
    for name, tensor in state.items():
        assert torch.equal(tensor[:600], stored.read_whole(name)[:600]), name
        assert not tensor[660:].any()
    weights, masters, first, second = (state[prefix + EMBEDDING] for prefix in prefixes)
    known = stored.read_whole(prefixes[1] + EMBEDDING)[:600]
    made = grow_rows(known, growth, "mean-of-pieces", seed=1)[600:]
    assert torch.equal(masters[600:660], made) and made.any()
    assert torch.equal(weights, masters.bfloat16())
    assert not first[600:].any() and first[:600].any()
    assert torch.equal(second[600:660], second[:600].mean(dim=0).expand(60, -1))


@pytest.mark.distributed
@pytest.mark.parametrize("begin", ["--load", "--pretrained-checkpoint", "--load-hf"])
def test_without_the_flag_a_larger_vocabulary_is_refused(folder: Path, begin: str) -> None:
    place = folder / ("hf" if begin == "--load-hf" else "start")
    config = ["--config", folder / "grown.yaml", "--dry-run", begin, place]
    output = jobs.run(jobs.pretrain(*config), expect=2)
    assert "--embedding-init" in output and "Traceback" not in output
    assert "model.vocab_size: 660 here and 600 in" in output


@pytest.mark.distributed
def test_a_model_section_that_is_not_the_folders_is_refused(folder: Path) -> None:
    config = ["--config", folder / "bare.yaml", "--dry-run", "--load-hf", folder / "hf"]
    output = jobs.run(jobs.pretrain(*config, "--num-layers", 3), expect=2)
    assert "error: model.num_layers: 3 differs from 4 in" in output
    output = jobs.run(jobs.pretrain(*config, "--preset", "llama2-7b"), expect=2)
    assert "error: model.num_layers: 32 differs from 4 in" in output
    assert "num_layers: 4" in jobs.run(jobs.pretrain(*config, "--verbose"))


@pytest.mark.distributed
def test_other_dtypes_come_from_the_master_weights(folder: Path, tmp_path: Path) -> None:
    done = export_checkpoint(folder / "start", tmp_path / "fp32", dtype="fp32")
    export_checkpoint(folder / "start", tmp_path / "fp16", dtype="fp16")
    assert "from the optimizer's fp32 master weights" in str(done)
    import_huggingface(tmp_path / "fp32", tmp_path / "run", dtype="bf16")
    export_checkpoint(tmp_path / "run", tmp_path / "again")
    names = ("fp32", "fp16", "again")
    exact, half, again = (HuggingFaceWeights(tmp_path / name) for name in names)
    stored = HuggingFaceWeights(folder / "hf")
    finer = 0
    for name in stored.files:
        assert torch.equal(exact.read(name).bfloat16(), stored.read(name)), name
        assert torch.equal(again.read(name), stored.read(name)), name
        assert torch.equal(half.read(name), exact.read(name).half()), name
        finer += not torch.equal(exact.read(name), stored.read(name).float())
    assert finer > len(stored.files) // 2


@pytest.mark.distributed
def test_small_files_travel_through_training_and_resume(tiny_run: TinyRun, tmp_path: Path) -> None:
    """One of two ranks writes the small files. They are verified like other checkpoint files."""
    base, run = tmp_path / "base", tmp_path / "run"
    shape = SHAPE_OF_TINY_RUN
    base.mkdir()
    tensors = {name: torch.randn(size) / 50 for name, size in huggingface_shapes(shape).items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps(huggingface_config(shape, torch.float32, {})))
    shutil.copy(tiny_run.tokenizer_model, base)
    small = {
        "tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}',
        "generation_config.json": '{"eos_token_id": [2, 7], "top_p": 0.9}',
        "additional_chat_templates/tool_use.jinja": "{{ messages }}",
        "chat_template.jinja": "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
    }
    for name, text in small.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(text)
    flags = ["--config", tiny_run.config, "--save", run, "--save-interval", 1]
    flags += ["--tokenizer-model", base / "tokenizer.model"]
    jobs.run_layouts(2, [[*flags, "--load-hf", base, "--train-iters", 2]], tmp_path)
    base.rename(tmp_path / "moved")  # The run resumes from its own checkpoint alone.
    flags[-1] = tiny_run.tokenizer_model
    resume = [*flags, "--load", run, "--ckpt-verify", "--train-iters", 3]
    jobs.run_layouts(2, [resume], tmp_path)
    export_checkpoint(run, tmp_path / "hf")
    for name, text in small.items():
        assert (tmp_path / "hf" / name).read_text() == text
    carried = run / "iter_0000003" / "huggingface" / "chat_template.jinja"
    carried.write_text("another")
    with pytest.raises(UserError, match="huggingface/chat_template.jinja has 7 bytes, but "):
        export_checkpoint(run, tmp_path / "damaged")
