#!/usr/bin/env python
"""Compares every supported architecture with transformers: conversion, logits, growth, a step.

``python tools/check_architectures.py`` builds small random models with the proportions of published
ones, imports and exports each of them, also with a larger vocabulary, loads it at every parallel
layout on two processes, trains it for a step, and prints a Markdown table of the largest
differences. ``--page docs/architectures.md`` replaces the table of that page. A new architecture
needs an entry in `MODELS`.
"""

from megatron_chatflow.errors import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # the imports below take seconds

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
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


def model_values(
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
    "LLaMA 2 7B": model_values("llama", 32, 86, (4, 4)),
    "LLaMA 3.2 1B": model_values(
        "llama", 64, 256, (8, 2), tie_word_embeddings=True, rope_parameters=LLAMA3
    ),
    "Mistral 7B v0.1": model_values("mistral", 64, 224, (8, 2), sliding_window=9),
    "Mistral NeMo": model_values("mistral", 40, 112, (4, 2), head_dim=8, sliding_window=None),
    "Qwen2.5 0.5B": model_values("qwen2", 56, 304, (14, 2), tie_word_embeddings=True, **_QWEN_ROPE),
    "Qwen2.5 7B": model_values("qwen2", 112, 592, (28, 4), **_QWEN_ROPE),
    "Qwen2.5 7B, YaRN": model_values("qwen2", 64, 304, (8, 2), rope_parameters=YARN, **_WINDOW),
    "Qwen3 0.6B": model_values(
        "qwen3", 32, 96, (4, 2), head_dim=16, tie_word_embeddings=True, **_QWEN_ROPE
    ),
    "Qwen3 8B": model_values("qwen3", 64, 192, (8, 2), head_dim=8, **_QWEN_ROPE),
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


KV_CACHE, PADDED, AROUND, BF16 = "KV cache", "padded heads", "around the window", "TP 2, bf16"
# Part of the largest logit that sums in bf16 may differ by.
BF16_TOLERANCE = 0.1
# The step: AdamW's settings, of which epsilon keeps noise out of the directions of small gradients.
LR, DECAY, EPSILON, STEP_TOLERANCE = 0.05, 0.5, 0.01, 2e-5


@dataclass(frozen=True)
class Case:
    """A forward pass whose logits are compared.

    Attributes:
        layout: Fields of the parallel section.
        folder: Name of the model's folder.
        lengths: Lengths of the packed documents.
        bf16: Whether to compute in bf16.
    """

    layout: dict[str, Any]
    folder: str = "hf"
    lengths: tuple[int, ...] = LENGTHS
    bf16: bool = False


def cases(values: dict[str, Any]) -> dict[str, Case]:
    """Returns the forward passes of a model of `MODELS` by their columns of the table."""
    found = {name: Case(layout) for name, layout in LAYOUTS.items()}
    found[PADDED] = Case({**TP2, "pad_attention_heads": True}, "padded")
    window = values.get("sliding_window")
    if window is not None:
        lengths = (window - 1, window, window + 1)
        found[AROUND] = Case(LAYOUTS["CP 2"], lengths=(*lengths, sum(LENGTHS) - sum(lengths)))
    found[BF16] = Case(TP2, bf16=True)
    return found


def with_three_groups(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a similar model that two tensor-parallel ranks divide by padding."""
    return {**values, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}


@dataclass(frozen=True)
class Result:
    """What was found for a model.

    Attributes:
        class_name: Its class in transformers.
        is_exact: Whether import and export give every tensor and config.json back.
        is_grown: Whether import with a larger vocabulary keeps all rows and adds means of rows.
        differences: The largest difference of the logits by column of the table.
        step: The largest difference of the weights after a step.
        largest_logit: The largest magnitude of the logits of transformers.
    """

    class_name: str
    is_exact: bool
    is_grown: bool
    differences: dict[str, float]
    step: float
    largest_logit: float

    @property
    def is_same(self) -> bool:
        """Whether everything agrees."""
        limits = dict.fromkeys(self.differences, TOLERANCE)
        limits[BF16] = BF16_TOLERANCE * self.largest_logit
        is_near = all(value <= limits[name] for name, value in self.differences.items())
        return self.is_exact and self.is_grown and is_near and self.step <= STEP_TOLERANCE


def token_ids(vocab_size: int) -> torch.Tensor:
    """Returns random ids of a packed micro-batch, int64[64], the same in every process."""
    return torch.randint(vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))


def save_tokenizer(folder: Path) -> Path:
    """Writes a byte-level tokenizer of 257 tokens, and one with 363 more; returns the first."""
    import tokenizers

    from megatron_chatflow.tokenizer import load_tokenizer
    from megatron_chatflow.tokenizer.extend import extend_tokenizer

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    ids = {character: number for number, character in enumerate(alphabet)}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=[]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(["<|end|>"])
    small = folder / "small"
    small.mkdir(parents=True)
    model.save(str(small / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (small / "tokenizer_config.json").write_text(json.dumps(names))
    pieces = [chr(0x4E00 + number) for number in range(363)]
    extend_tokenizer(load_tokenizer(small), pieces, folder / "large")
    return small


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


def is_grown(folder: Path, small: Path, scratch: Path) -> bool:
    """Returns whether import with a larger vocabulary keeps rows, and new ones are means of rows.

    Args:
        folder: A Hugging Face folder.
        small: Its tokenizer; the larger one is beside it.
        scratch: An existing folder.
    """
    from megatron_chatflow.convert.safetensors import HuggingFaceWeights
    from megatron_chatflow.convert.vocabulary import Resize
    from megatron_chatflow.tokenizer import load_tokenizer

    complete = shutil.copytree(folder, scratch / "complete")
    shutil.copytree(small, complete, dirs_exist_ok=True)
    old, new = load_tokenizer(small), load_tokenizer(small.with_name("large"))
    import_huggingface(complete, scratch / "larger", resize=Resize(new))
    export_checkpoint(scratch / "larger", scratch / "grown")
    before, after = HuggingFaceWeights(folder), HuggingFaceWeights(scratch / "grown")
    names = [old.encode_continuation(new.decode([k])) for k in range(old.vocab_size, 613)]
    for name in before.files:
        one, other = before.read(name), after.read(name)
        if "embed_tokens" in name or "lm_head" in name:
            means = torch.stack([one[ids].mean(0) for ids in names])
            added = other[old.vocab_size : old.vocab_size + len(means)]
            if len(other) != new.vocab_size or (added - means).abs().max() > 1e-6:
                return False
            one, other = one[: old.vocab_size], other[: old.vocab_size]
        if not torch.equal(one, other):
            return False
    return True


def expected_logits(folder: Path, vocab_size: int, lengths: Sequence[int]) -> torch.Tensor:
    """Returns the logits of transformers, document by document, float32[64, vocab_size]."""
    documents = token_ids(vocab_size).split(list(lengths))
    return torch.cat(transformers_logits(folder, [ids.tolist() for ids in documents]))


def cached_logits(folder: Path, vocab_size: int) -> torch.Tensor:
    """Returns the logits of transformers, token by token with its KV cache."""
    import inspect

    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    # transformers 5.24 renamed the argument and the output `past_key_values`.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    rows = []
    with torch.no_grad():
        for ids in token_ids(vocab_size).split(LENGTHS):
            cache = None
            for token_id in ids:
                output = model(token_id.view(1, 1), use_cache=True, **{name: cache})
                cache = output[name]
                rows.append(output.logits[0, -1])
    return torch.stack(rows)


def sample() -> torch.Tensor:
    """Returns the ids of the only sample that the step is trained on, int64[33]."""
    return torch.randint(256, (33,), generator=torch.Generator().manual_seed(5))


def write_step(folder: Path, path: Path, small: Path) -> None:
    """Writes the dataset and the configuration of a step on a model; ``path`` is its folder."""
    import numpy as np

    from megatron_chatflow.data.indexed import IndexedDatasetWriter

    prefix = folder / "text_document"
    if not prefix.with_suffix(".idx").exists():
        writer = IndexedDatasetWriter(prefix, np.uint16)
        writer.add_document(sample().numpy().astype(np.uint16))
        writer.finalize()
    sizes = {"train_iters": 1, "global_batch_size": 2, "micro_batch_size": 1, "bf16": False}
    rates = {"lr": LR, "min_lr": LR, "weight_decay": DECAY, "adam_eps": EPSILON}
    config = {
        "tokenizer": {"tokenizer_model": str(small)},
        "data": {"seq_length": 32, "sources": {"text": {"paths": [str(prefix)]}}},
        "train": sizes,
        "parallel": {**TP2, "use_distributed_optimizer": True},
        "optimizer": rates,
        "checkpoint": {"load_hf": str(path / "hf"), "save": str(path / "step")},
    }
    (path / "step.yaml").write_text(json.dumps(config))


def step_difference(path: Path) -> float:
    """Returns the largest difference from a step with transformers and PyTorch's AdamW."""
    from transformers import AutoModelForCausalLM

    from megatron_chatflow.convert.safetensors import HuggingFaceWeights

    model: Any = AutoModelForCausalLM.from_pretrained(path / "hf")
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=EPSILON)
    ids = sample()
    logits = model(input_ids=ids[None, :-1]).logits[0]
    torch.nn.functional.cross_entropy(logits, ids[1:]).backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    export_checkpoint(path / "step", path / "updated", tokenizer=TokenizerChoice(leave_out=True))
    weights, expected = HuggingFaceWeights(path / "updated"), model.state_dict()
    return max(float((weights.read(n) - expected[n]).abs().max()) for n in weights.files)


def logits_of(path: Path, case: Case) -> torch.Tensor | None:
    """Loads a model at a layout and computes the logits; every process calls it.

    Returns:
        float32[64, vocab_size] on the last pipeline stage, None elsewhere.
    """
    from megatron_chatflow.config.shape import num_model_chunks
    from megatron_chatflow.runtime.launch import device_mode, initialize

    folder = path / case.folder
    shape = shape_of_huggingface(folder)
    model = ModelConfig(**{name: getattr(shape, name) for name in LlamaShape.__dataclass_fields__})
    parallel = ParallelConfig(**case.layout)
    train = TrainConfig(train_iters=1, micro_batch_size=1, global_batch_size=2, bf16=case.bf16)
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
    cu_seqlens = torch.tensor([0, *accumulate(case.lengths)], dtype=torch.int32)
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
    """Computes every case of every model below a folder, and trains a step; one of two processes.

    The logits are written beside the models.
    """
    import gc

    from megatron_chatflow.config import load_config_from_argv
    from megatron_chatflow.pretrain import run_training
    from megatron_chatflow.runtime.launch import finalize, initialize

    for path in sorted(folder.iterdir()):
        for name, case in cases(MODELS[path.name]).items():
            logits = logits_of(path, case)
            # Every process of the last stage has them.
            if logits is not None and torch.distributed.get_rank() == NUM_PROCESSES - 1:
                torch.save(logits, path / f"{name}.pt")
        config, _ = load_config_from_argv(["--config", str(path / "step.yaml")])
        ranks = initialize(**TP2, seed=1)
        run_training(config, ranks)
        from megatron_chatflow.runtime.ranks import destroy_groups

        destroy_groups()
        gc.collect()  # a group ends with its last reference
    finalize()


def check(folder: Path, start: Any, names: Sequence[str] = tuple(MODELS)) -> dict[str, Result]:
    """Checks models.

    Args:
        folder: An empty folder.
        start: Runs this script with the given arguments on `NUM_PROCESSES` processes.
        names: Names of `MODELS`.
    """
    exact, grown, models = {}, {}, folder / "models"
    small = save_tokenizer(folder / "tokenizers")
    for name in names:
        scratch, path = folder / name, models / name
        save_model(path / "hf", MODELS[name])
        save_model(path / "padded", with_three_groups(MODELS[name]))
        write_step(folder, path, small)
        scratch.mkdir()
        exact[name] = is_exact(path / "hf", scratch)
        grown[name] = is_grown(path / "hf", small, scratch)
    start("--worker", str(models))
    results = {}
    for name in names:
        path, size = models / name, MODELS[name]["vocab_size"]
        expected: dict[Any, torch.Tensor] = {}
        differences = {}
        for column, case in cases(MODELS[name]).items():
            key = case.folder, case.lengths
            if key not in expected:
                expected[key] = expected_logits(path / case.folder, size, case.lengths)
            found = torch.load(path / f"{column}.pt")
            differences[column] = float((found - expected[key]).abs().max())
        cached = cached_logits(path / "hf", size) - torch.load(path / "DP 2.pt")
        differences[KV_CACHE] = float(cached.abs().max())
        results[name] = Result(
            json.loads((path / "hf" / "config.json").read_text())["architectures"][0],
            exact[name],
            grown[name],
            differences,
            step_difference(path),
            float(expected["hf", LENGTHS].abs().max()),
        )
    return results


def table(results: dict[str, Result]) -> str:
    """Formats results as a Markdown table."""
    columns = [*LAYOUTS, PADDED, AROUND, KV_CACHE, BF16]
    head = ["architecture", "proportions of", "import and export", "growth", "largest logit"]
    head += [*columns, "optimizer step"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, result in results.items():
        cells = [f"`{result.class_name}`", name, "bit-exact" if result.is_exact else "DIFFERENT"]
        cells += ["exact" if result.is_grown else "DIFFERENT", f"{result.largest_logit:.1f}"]
        found = result.differences
        cells += [f"{found[column]:.1e}" if column in found else "" for column in columns]
        cells += [f"{result.step:.1e}"]
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
