"""Adapts a real pre-trained model to Chinese on two CPU cores, with all steps of ChatFlow.

``python examples/smollm2_zh/demo.py [--short] [--variants staged ...]``; ``make smollm2``
installs what it needs. It writes ``runs/smollm2_zh/``: the run and the export of each variant,
``summary.json`` and ``table.md``. Steps whose output is present are skipped, and an interrupted
training is resumed from its last checkpoint.
"""

from megatron_chatflow.errors import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # the imports below take seconds

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.smollm2_zh.report import HELD_OUT_FORMATS, hold_out, markdown_table, summarize
from examples.steps import (
    CORPUS,
    ROOT,
    SOURCES,
    announce,
    fetch_corpus,
    preprocess,
    pretrain,
    run_tool,
)
from megatron_chatflow.errors import ArgumentParser, UserError, run_main
from megatron_chatflow.files import write_atomically

HERE = Path("examples/smollm2_zh")
WORK = Path(".demo/smollm2")
BASE = WORK / "base"
VARIANTS = ("extended", "plain", "staged", "distilled")
# Stages of the staged variant: the learning rate of the new rows as a multiple of the common one,
# while they alone are trained and afterwards, and the part of the run in which they are.
NEW_ROWS_FACTORS = (20.0, 10.0)
FIRST_STAGE = 1 / 12
# A multiple of 128, like the original 49,152, so that no row is padding. The new tokens cover 99 %
# of the Chinese characters in the demo's Chinese text.
NUM_NEW_TOKENS = 3072
# The number of iterations that are trained at TP 2 as well, and the tolerance of their losses in
# bf16.
NUM_COMPARED = 2
TENSOR_PARALLEL_TOLERANCE = 0.01
PROMPTS = ("请介绍一下北京。", "What is a computer?", "把下面的句子翻译成英文：今天天气很好。")


@dataclass(frozen=True)
class Length:
    """The size of the example.

    Attributes:
        folder: The folder of the runs.
        iterations: Number of iterations of each variant.
        held_out_bytes: Bytes of each source to evaluate on.
        sample_tokens: Maximum length of a sample in tokens.
        distill_tokens: Tokens of Chinese text to which the distilled variant fits its new rows.
    """

    folder: Path
    iterations: int
    held_out_bytes: int
    sample_tokens: int
    distill_tokens: int


FULL = Length(Path("runs/smollm2_zh"), 180, 20_000, 48, 100_000)
SHORT = Length(Path("runs/smollm2_zh_short"), 4, 2_000, 8, 1_000)


@dataclass(frozen=True)
class Variant:
    """A choice of vocabulary and of stages.

    Attributes:
        name: "plain" for the model's own tokenizer, "extended" for one with Chinese characters,
            "staged" for the latter with a first stage that trains the new rows only, "distilled"
            for it with new rows that were fitted to Chinese text before.
        folder: The folder of its run and export.
    """

    name: str
    folder: Path

    @property
    def is_extended(self) -> bool:
        """Whether its tokenizer has Chinese characters."""
        return self.name != "plain"

    @property
    def tokenizer(self) -> Path:
        """The folder with its tokenizer."""
        return WORK / "tokenizer_extended" if self.is_extended else BASE

    @property
    def tokens(self) -> Path:
        """The folder with its indexed datasets."""
        return WORK / ("extended" if self.is_extended else "plain")

    def stages(self, iterations: int) -> list[dict[str, object]]:
        """Returns the stages of a run, in iterations."""
        if self.name != "staged":
            return []
        first, later = NEW_ROWS_FACTORS
        boundary = max(1, round(iterations * FIRST_STAGE))
        return [
            {"at": 0, "trainable": ["new_rows"], "lr_multipliers": {"new_rows": first}},
            {"at": boundary, "trainable": ["all"], "lr_multipliers": {"new_rows": later}},
        ]

    @property
    def start(self) -> Path:
        """The Hugging Face folder with its initial weights."""
        return self.folder / "start" if self.is_extended else BASE


def main() -> None:
    """Runs every step and prints the results."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="run few iterations, about 3 minutes")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="default: all"
    )
    parser.add_argument(
        "--iterations", type=int, metavar="N", help="number of training iterations of each variant"
    )
    args = parser.parse_args()
    length = _length(args.short, args.iterations)
    os.chdir(ROOT)
    fetch_corpus(is_small=args.short)
    if not (BASE / "config.json").exists():
        run_tool("fetch_demo_model.py", "--output-dir", BASE, "--dtype", "bf16")
    held_out = hold_out(CORPUS, length.folder / "held_out", length.held_out_bytes)
    variants = [Variant(name, length.folder / name) for name in args.variants]
    for variant in variants:
        prepare(variant, length)
        train(variant, length)
        compare_tensor_parallel(variant)
        run_tool_once(variant.folder / "export" / "config.json", *export_flags(variant, "run"))
    evaluate(BASE, length.folder / "base.json", held_out)
    sample(BASE, length.folder / "base.txt", length)
    for variant in variants:
        if variant.start != BASE:
            evaluate(variant.start, variant.folder / "start.json", held_out)
        evaluate(variant.folder / "export", variant.folder / "export.json", held_out)
        sample(variant.folder / "export", variant.folder / "export.txt", length)
    summary = summarize(length.folder, VARIANTS)
    write_atomically(
        length.folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    )
    table = markdown_table(summary)
    write_atomically(length.folder / "table.md", table)
    announce("bits per byte of held-out text, and samples")
    print(table)
    print(f"Written to {length.folder}: summary.json and table.md; its export/ folders load in")
    print(f"transformers: python tools/chat.py {length.folder}/extended/export")


def _length(is_short: bool, iterations: int | None) -> Length:
    """Returns the size of the example. Each number of iterations has its own folder."""
    length = SHORT if is_short else FULL
    if iterations is None:
        return length
    if iterations < 4:
        raise UserError(f"--iterations: must be at least 4, not {iterations}")
    folder = length.folder.with_name(f"{length.folder.name}_{iterations}")
    return replace(length, folder=folder, iterations=iterations)


def run_tool_once(result: Path, name: str, *arguments: object) -> None:
    """Runs a tool unless its last output, ``result``, is present."""
    if not result.exists():
        run_tool(name, *arguments)


def prepare(variant: Variant, length: Length) -> None:
    """Makes vocabulary, tokens and weights, and verifies the weights against transformers."""
    chinese = CORPUS / "chinese.train.jsonl"
    if variant.is_extended:
        run_tool_once(
            variant.tokenizer / "tokenizer.json",
            "extend_vocab.py",
            *("--tokenizer-model", BASE, "--corpus", chinese),
            *("--num-new", NUM_NEW_TOKENS, "--output-dir", variant.tokenizer),
        )
    flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", variant.tokenizer)
    for source in SOURCES:
        preprocess(source, "train", variant.tokens / source, (*flags, "--template", "chatflow"))
    imported = variant.folder / "imported"
    resize: tuple[object, ...] = ("--tokenizer-model", variant.tokenizer, "--embedding-init")
    if variant.name == "distilled":
        resize += ("distill", "--distill-text", chinese)
        resize += ("--distill-tokens", length.distill_tokens)
    else:
        resize += ("mean-of-pieces",)
    run_tool_once(
        imported / "latest_checkpointed_iteration.txt",
        "convert_checkpoint.py",
        *("import", "--hf", BASE, "--output", imported),
        *(resize if variant.is_extended else ()),
    )
    verified = variant.folder / "verified"
    if not verified.exists():
        if variant.is_extended:
            run_tool_once(variant.start / "config.json", *export_flags(variant, "imported"))
        run_tool("convert_checkpoint.py", "verify", "--hf", variant.start, "--checkpoint", imported)
        verified.touch()


def export_flags(variant: Variant, what: str) -> tuple[object, ...]:
    """Returns the command that exports a variant's trained or imported weights."""
    checkpoint, output = variant.folder / what, variant.folder / "export"
    if what == "imported":
        output = variant.start
    return (
        "convert_checkpoint.py",
        *("export", "--checkpoint", checkpoint, "--output", output),
        *("--tokenizer-model", variant.tokenizer, "--chat-template", "chatflow"),
    )


def train(variant: Variant, length: Length) -> None:
    """Trains a variant or resumes its training, unless it is complete."""
    config = yaml.safe_load((HERE / "chatflow.yaml").read_text(encoding="utf-8"))
    config["tokenizer"]["tokenizer_model"] = str(variant.tokenizer)
    for source in config["data"]["sources"].values():
        source["paths"] = [str(variant.tokens / Path(path).name) for path in source["paths"]]
    iterations = length.iterations
    config["train"]["train_iters"] = iterations
    config["train"]["stages"] = variant.stages(iterations)
    config["optimizer"]["lr_warmup_iters"] = max(1, iterations // 12)
    config["data"]["schedule"]["knots"][-1]["at"] = iterations * 2 // 3
    run = variant.folder / "run"
    latest = run / "latest_checkpointed_iteration.txt"
    if latest.exists() and int(latest.read_text()) >= iterations:
        return
    path = variant.folder / "chatflow.yaml"
    write_atomically(path, yaml.safe_dump(config, sort_keys=False))
    pretrain(
        f"training the {variant.name} variant on 2 ranks",
        path,
        *("--save", run, "--load", run),
        *("--pretrained-checkpoint", variant.folder / "imported"),
    )


def compare_tensor_parallel(variant: Variant) -> None:
    """Repeats the first iterations with tensor parallelism and compares their losses.

    Two ranks cannot share 3 query groups evenly, so a fourth group of zeros pads them.
    """
    run = variant.folder / "tensor_parallel"
    metrics = run / "metrics.jsonl"
    if not metrics.exists():
        pretrain(
            f"the first {NUM_COMPARED} iterations of the {variant.name} variant at TP 2",
            variant.folder / "chatflow.yaml",
            *("--save", run, "--pretrained-checkpoint", variant.folder / "imported"),
            *("--tensor-model-parallel-size", 2, "--pad-attention-heads"),
            *("--exit-interval", NUM_COMPARED),
        )
        for checkpoint in run.glob("iter_*"):
            shutil.rmtree(checkpoint)
    expected, found = first_losses(variant.folder / "run"), first_losses(run)
    difference = max(abs(ours - theirs) for ours, theirs in zip(found, expected, strict=True))
    print(f"losses at DP 2 and TP 2 differ by at most {difference:.1e}")
    if difference > TENSOR_PARALLEL_TOLERANCE:
        raise UserError(f"{metrics}: losses {found} differ from those at DP 2, {expected}")


def first_losses(run: Path) -> list[float]:
    """Returns the losses of the first `NUM_COMPARED` iterations of a run."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return [entry["lm_loss"] for entry in entries if "lm_loss" in entry][:NUM_COMPARED]


def evaluate(model: Path, output: Path, held_out: dict[str, Path]) -> None:
    """Measures bits per byte of each source's held-out text, unless the result is present."""
    run_tool_once(
        output,
        *("evaluate.py", model, "--output", output, "--max-length", 512, "--template", "chatflow"),
        *(f"--source={name}:{HELD_OUT_FORMATS[name]}={path}" for name, path in held_out.items()),
    )


def sample(model: Path, output: Path, length: Length) -> None:
    """Writes a model's answers to the prompts, generated with its own chat template."""
    if output.exists():
        return
    command = [sys.executable, "tools/generate.py", str(model), "--chat", "--temperature", "0"]
    command += ["--max-new-tokens", str(length.sample_tokens)]
    for prompt in PROMPTS:
        command += ["--prompt", prompt]
    announce(shlex.join(command[1:]))
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        raise UserError("tools/generate.py failed, see above")
    answers, rest = {}, done.stdout
    for prompt in reversed(PROMPTS):  # each answer follows its prompt
        rest, _, answer = rest.rpartition(f"> {prompt}\n")
        answers[prompt] = answer.strip()
    in_order = {prompt: answers[prompt] for prompt in PROMPTS}
    write_atomically(output, json.dumps(in_order, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run_main(main)
