#!/usr/bin/env python
"""Compares every supported architecture with transformers: conversion, and logits by layout.

``python tools/check_architectures.py`` builds small random models with the proportions of published
ones, imports and exports each of them, loads it at every parallel layout on two processes, and
prints a Markdown table of the largest differences of the logits in fp32. ``--page
docs/architectures.md`` replaces the table of that page. A new architecture needs an entry in
`MODELS`.
"""

from megatron_chatflow.errors import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # the imports below take seconds

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_chatflow.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_chatflow.convert.from_huggingface import import_huggingface
from megatron_chatflow.convert.shape import LlamaShape, shape_of_huggingface
from megatron_chatflow.convert.template import TokenizerChoice
from megatron_chatflow.convert.to_huggingface import export_checkpoint
from megatron_chatflow.convert.verify import compare_weights, transformers_logits
from megatron_chatflow.errors import ArgumentParser, UserError, run_main

TOLERANCE = 1e-4
NUM_PROCESSES = 2
# Documents of a packed micro-batch. Every layout divides their 64 tokens.
LENGTHS = (23, 41)
BEGIN, END = "<!-- table begin -->", "<!-- table end -->"
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "rope_theta": 5e5}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


def _model(
    model_type: str, hidden: int, ffn: int, heads: tuple[int, int], **others: Any
) -> dict[str, Any]:
    """Returns fields of config.json of a small model with an odd vocabulary."""
    return {
        "model_type": model_type,
        "vocab_size": 613,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": 4,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "max_position_embeddings": 128,
        **others,
    }


# Qwen2.5's YaRN of 4 times 32768 tokens, and a window in every layer.
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 32}
_WINDOW = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0}
_QWEN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
# Small models by the published one whose proportions they have.
MODELS: dict[str, dict[str, Any]] = {
    "LLaMA 2 7B": _model("llama", 32, 86, (4, 4)),
    "LLaMA 3.2 1B": _model(
        "llama", 64, 256, (8, 2), tie_word_embeddings=True, rope_parameters=LLAMA3
    ),
    "Mistral 7B v0.1": _model("mistral", 64, 224, (8, 2), sliding_window=9),
    "Mistral NeMo": _model("mistral", 40, 112, (4, 2), head_dim=8, sliding_window=None),
    "Qwen2.5 0.5B": _model("qwen2", 56, 304, (14, 2), tie_word_embeddings=True, **_QWEN_ROPE),
    "Qwen2.5 7B": _model("qwen2", 112, 592, (28, 4), **_QWEN_ROPE),
    "Qwen2.5 7B, YaRN": _model("qwen2", 64, 304, (8, 2), rope_parameters=YARN, **_WINDOW),
    "Qwen3 0.6B": _model(
        "qwen3", 32, 96, (4, 2), head_dim=16, tie_word_embeddings=True, **_QWEN_ROPE
    ),
    "Qwen3 8B": _model("qwen3", 64, 192, (8, 2), head_dim=8, **_QWEN_ROPE),
}
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
# Fields of the parallel section by the name of the layout, each on two processes.
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP 2": {},
    "TP 2": TP2,
    "TP 2, sequence": {**TP2, "sequence_parallel": True},
    "PP 2": PP2,
    "PP 2, interleaved": {**PP2, "num_virtual_stages_per_pipeline_rank": 2},
    "CP 2": {"context_parallel_size": 2},
}


@dataclass(frozen=True)
class Result:
    """What was found for a model.

    Attributes:
        class_name: Its class in transformers.
        is_exact: Whether import and export give every tensor and config.json back.
        differences: The largest difference of the logits by layout.
        largest_logit: The largest magnitude of the logits of transformers.
    """

    class_name: str
    is_exact: bool
    differences: dict[str, float]
    largest_logit: float

    @property
    def is_same(self) -> bool:
        """Whether everything agrees."""
        return self.is_exact and max(self.differences.values()) <= TOLERANCE


def token_ids(vocab_size: int) -> torch.Tensor:
    """Returns random ids of a packed micro-batch, int64[64], the same in every process."""
    return torch.randint(vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))


def save_model(folder: Path, values: dict[str, Any], *, seed: int = 7) -> Path:
    """Creates a Hugging Face folder with transformers, with random norms and biases as well."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(values)
    config: Any = AutoConfig.for_model(values.pop("model_type"), **values)
    generator = torch.Generator().manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Biases are as large as in Qwen2, where some dominate the keys.
            parameter.copy_(noise * (0.5 if name.endswith("bias") else 0.2) + ("norm" in name))
    model.save_pretrained(folder)
    return folder


def is_exact(folder: Path, scratch: Path) -> bool:
    """Returns whether import and export give the tensors and config.json of a folder back."""
    import_huggingface(folder, scratch / "run")
    no_tokenizer = TokenizerChoice(leave_out=True)
    export_checkpoint(scratch / "run", scratch / "back", tokenizer=no_tokenizer)
    one, other = (
        json.loads((path / "config.json").read_text()) for path in (folder, scratch / "back")
    )
    shape, checkpoint = shape_of_huggingface(folder), scratch / "run" / "iter_0000000"
    is_alike = all(
        not compare_weights(path, checkpoint, shape)[0] for path in (folder, scratch / "back")
    )
    return is_alike and one == other


def expected_logits(folder: Path, vocab_size: int) -> torch.Tensor:
    """Returns the logits of transformers, document by document, float32[64, vocab_size]."""
    documents = token_ids(vocab_size).split(LENGTHS)
    return torch.cat(transformers_logits(folder, [ids.tolist() for ids in documents]))


def logits_of(folder: Path, layout: dict[str, Any]) -> torch.Tensor | None:
    """Loads a Hugging Face folder at a layout and computes the logits; every process calls it.

    Returns:
        float32[64, vocab_size] on the last pipeline stage, None elsewhere.
    """
    from megatron_chatflow.config.shape import num_model_chunks
    from megatron_chatflow.runtime.launch import device_mode, initialize

    shape = shape_of_huggingface(folder)
    model = ModelConfig(**{name: getattr(shape, name) for name in LlamaShape.__dataclass_fields__})
    parallel = ParallelConfig(**layout)
    train = TrainConfig(train_iters=1, micro_batch_size=1, global_batch_size=2, bf16=False)
    ranks = initialize(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        num_model_chunks=num_model_chunks(model, parallel),
        context_parallel_size=parallel.context_parallel_size,
        seed=1,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    from megatron_chatflow.convert.load_huggingface import load_huggingface
    from megatron_chatflow.model.llama import build_llama
    from megatron_chatflow.model.packed import gather_context, pack_tokens, shard_context
    from megatron_chatflow.runtime import ranks as groups

    with device_mode(ranks.device):
        llama = build_llama(model, parallel, train, ranks, vocab_size=shape.vocab_size)
    load_huggingface(folder, llama.chunks, ranks)
    ids = token_ids(shape.vocab_size)
    shard = shard_context(
        len(ids),
        rank=ranks.context_parallel_rank,
        size=ranks.context_parallel_size,
        group=groups.context_parallel_group(),
    )
    cu_seqlens = torch.tensor([0, LENGTHS[0], sum(LENGTHS)], dtype=torch.int32)
    packed = pack_tokens(
        cu_seqlens,
        shard,
        rotary=llama.rotary,
        dtype=llama.dtype,
        device=ranks.device,
        window=llama.window,
    )

    def collect(hidden: torch.Tensor, non_loss_data: bool = False) -> torch.Tensor:
        rows = hidden[0]
        if parallel.sequence_parallel:
            rows = gather_from_sequence_parallel_region(rows)
        local = gather_context(rows @ llama.output_weight.T, shard)
        parts = [torch.empty_like(local) for _ in range(ranks.tensor_parallel_size)]
        torch.distributed.all_gather(parts, local, group=groups.tensor_parallel_group())
        return torch.cat(parts, dim=-1)[:, : shape.vocab_size]

    def forward(batches: Any, chunk: Any) -> tuple[torch.Tensor, Any]:
        tokens = shard.select(next(batches)).unsqueeze(0)
        return chunk(tokens.to(ranks.device), None, None, packed_seq_params=packed), collect

    batches = [ids] * ranks.pipeline_parallel_size  # the interleaved schedule needs as many
    for chunk in llama.chunks:
        chunk.eval()
    with torch.no_grad(), device_mode(ranks.device):
        results = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(batches) for _ in llama.chunks],
            model=llama.chunks,
            num_microbatches=len(batches),
            seq_length=len(ids),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    torch.distributed.barrier()
    groups.destroy_groups()
    return results[0].float().cpu() if results else None


def run_worker(folder: Path) -> None:
    """Writes the logits of every model below a folder at every layout; one of two processes."""
    from megatron_chatflow.runtime.launch import finalize

    for path in sorted(folder.iterdir()):
        for name, layout in LAYOUTS.items():
            logits = logits_of(path / "hf", layout)
            # Every process of the last stage has them.
            if logits is not None and torch.distributed.get_rank() == NUM_PROCESSES - 1:
                torch.save(logits, path / f"{name}.pt")
    finalize()


def check(folder: Path, start: Any, names: Sequence[str] = tuple(MODELS)) -> dict[str, Result]:
    """Checks models.

    Args:
        folder: An empty folder.
        start: Runs this script with the given arguments on `NUM_PROCESSES` processes.
        names: Names of `MODELS`.
    """
    exact, models = {}, folder / "models"
    for name in names:
        save_model(models / name / "hf", MODELS[name])
        (folder / name).mkdir()
        exact[name] = is_exact(models / name / "hf", folder / name)
    start("--worker", str(models))
    results = {}
    for name in names:
        path = models / name
        expected = expected_logits(path / "hf", MODELS[name]["vocab_size"])
        results[name] = Result(
            json.loads((path / "hf" / "config.json").read_text())["architectures"][0],
            exact[name],
            {
                layout: float((torch.load(path / f"{layout}.pt") - expected).abs().max())
                for layout in LAYOUTS
            },
            float(expected.abs().max()),
        )
    return results


def table(results: dict[str, Result]) -> str:
    """Formats results as a Markdown table."""
    head = ["architecture", "proportions of", "import and export", "largest logit", *LAYOUTS]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, result in results.items():
        cells = [f"`{result.class_name}`", name, "bit-exact" if result.is_exact else "DIFFERENT"]
        cells += [f"{result.largest_logit:.1f}"]
        cells += [f"{result.differences[layout]:.1e}" for layout in LAYOUTS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _torchrun(*arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={NUM_PROCESSES}", __file__, *arguments]
    if subprocess.run(command, check=False).returncode != 0:
        raise UserError("the processes failed; see their output above")


def _replace_table(page: Path, text: str) -> None:
    content = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"{page}: has no lines {BEGIN} and {END}; add them around the table")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, help="Markdown page whose table is replaced")
    parser.add_argument("--worker", type=Path, help="for the processes that this script starts")
    options = parser.parse_args(arguments)
    if options.worker is not None:
        run_worker(options.worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        results = check(Path(folder), _torchrun)
    text = table(results)
    print(text)
    if options.page is not None:
        _replace_table(options.page, text)
    different = [name for name, result in results.items() if not result.is_same]
    if different:
        raise UserError(f"differs from transformers: {', '.join(different)}")


if __name__ == "__main__":
    run_main(main)
