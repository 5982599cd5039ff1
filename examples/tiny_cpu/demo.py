"""Trains a small model on one CPU: from real text to a killed, resumed and exported run.

``python examples/tiny_cpu/demo.py [--short]``; ``make demo`` installs what it needs. It writes
``runs/tiny_cpu/``: both runs, the exported Hugging Face folder, ``report.html`` and
``summary.json``.
"""

from megatron_chatflow.errors import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # the imports below take seconds

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.steps import (
    CORPUS,
    ROOT,
    SOURCES,
    announce,
    fetch_corpus,
    preprocess,
    pretrain,
    pretrain_command,
    run_tool,
)
from megatron_chatflow.errors import ArgumentParser, UserError, run_main
from megatron_chatflow.files import write_output_file

HERE = Path("examples/tiny_cpu")
TOKENS = Path(".demo/tokens")
RUNS = Path("runs/tiny_cpu")
PROMPTS = {"english": "What is a computer?", "chinese": "请介绍一下北京。"}


@dataclass(frozen=True)
class Lengths:
    """Numbers of iterations.

    Attributes:
        foundation: Lengths of the English foundation.
        chatflow: Lengths of the ChatFlow run.
        ramp_end: The iteration at which the ramp of the ChatFlow schedule ends.
        kill: The earliest iteration at which the ChatFlow run is killed.
        save_interval: Iterations between its checkpoints.
        eval_interval: Iterations between its validations.
    """

    foundation: int
    chatflow: int
    ramp_end: int
    kill: int
    save_interval: int
    eval_interval: int


FULL = Lengths(100, 190, 115, 90, 20, 95)
SHORT = Lengths(16, 32, 20, 14, 4, 16)


def main() -> None:
    """Runs every step and prints the results."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="run few iterations, about 5 minutes")
    is_short = parser.parse_args().short
    length = SHORT if is_short else FULL
    os.chdir(ROOT)
    begin = time.monotonic()
    fetch_corpus(is_short)
    for source in SOURCES:
        for split, name in (("train", source), ("valid", f"{source}_valid")):
            model = CORPUS / "tokenizer.model"
            preprocess(source, split, TOKENS / name, ("--tokenizer-model", model))
    shutil.rmtree(RUNS, ignore_errors=True)
    train_foundation(length)
    killed_at, resumed_at, num_repeated = train_chatflow(length)
    run_tool(
        "convert_checkpoint.py",
        "export",
        "--checkpoint",
        RUNS / "chatflow",
        "--output",
        RUNS / "export",
    )
    run_tool(
        "plot_run.py", RUNS / "foundation", RUNS / "chatflow", "--output", RUNS / "report.html"
    )
    summary = write_summary(killed_at, resumed_at)
    print_table(summary)
    for prompt in PROMPTS.values():
        run_tool(
            "generate.py",
            RUNS / "export",
            "--chat",
            "--prompt",
            prompt,
            "--max-new-tokens",
            "48",
            "--seed",
            "1",
        )
    print(
        f"\nKilled in iteration {killed_at}, resumed at {resumed_at}: {num_repeated} iterations "
        "were trained twice, with identical batches and losses."
    )
    print(f"Open {RUNS / 'report.html'}; {RUNS / 'export'} loads in transformers.")
    print(f"The demo took {(time.monotonic() - begin) / 60:.1f} minutes.")


def train_foundation(length: Lengths) -> None:
    """Trains the English foundation."""
    flags = ("--train-iters", length.foundation, "--eval-interval", length.foundation)
    pretrain("English foundation on 2 ranks, TP=2", HERE / "foundation.yaml", *flags)


def train_chatflow(length: Lengths) -> tuple[int, int, int]:
    """Trains the ChatFlow run, kills it, and resumes it.

    Returns:
        The iteration in which it was killed, the iteration of the checkpoint that it was resumed
        from, and the number of iterations that were trained twice.
    """
    folder = RUNS / "chatflow"
    command = pretrain_command(
        _config_of_length(length),
        "--train-iters",
        length.chatflow,
        "--save-interval",
        length.save_interval,
        "--eval-interval",
        length.eval_interval,
    )
    announce("ChatFlow on 2 ranks, TP=2, from the foundation's weights; it will be killed")
    job = subprocess.Popen(
        [*command, "--load", str(RUNS / "foundation"), "--finetune"], start_new_session=True
    )
    try:
        while _last_iteration(folder) < length.kill:
            if job.poll() is not None:
                raise UserError("the ChatFlow run failed before it could be killed, see above")
            time.sleep(0.05)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    before = _iterations(folder)
    killed_at = max(before)
    resumed_at = int((folder / "latest_checkpointed_iteration.txt").read_text())
    announce(f"killed after iteration {killed_at}; resuming from the checkpoint of {resumed_at}")
    if subprocess.run([*command, "--load", str(folder)], check=False).returncode:
        raise UserError("the resumed run failed, see above")
    after = _iterations(folder)
    repeated = range(resumed_at + 1, killed_at + 1)
    for iteration in repeated:
        for key in ("batch_digest", "lm_loss", "grad_norm"):
            if before[iteration][key] != after[iteration][key]:
                raise UserError(
                    f"iteration {iteration}: {key} is {after[iteration][key]} after the resume and "
                    f"was {before[iteration][key]}; please report this"
                )
    return killed_at, resumed_at, len(repeated)


def _config_of_length(length: Lengths) -> Path:
    """Writes the ChatFlow configuration with its ramp scaled to the demo's length."""
    config = yaml.safe_load((HERE / "chatflow.yaml").read_text(encoding="utf-8"))
    config["data"]["schedule"]["knots"][-1]["at"] = length.ramp_end
    path = RUNS / "chatflow.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def _entries(folder: Path) -> list[dict[str, Any]]:
    """Reads the complete lines of a run's metrics, without one that is being written."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _iterations(folder: Path) -> dict[int, dict[str, Any]]:
    return {entry["iteration"]: entry for entry in _entries(folder) if "lm_loss" in entry}


def _last_iteration(folder: Path) -> int:
    return max(_iterations(folder), default=0)


def write_summary(killed_at: int, resumed_at: int) -> dict[str, Any]:
    """Writes bits per byte of each source before and after the ChatFlow run to ``summary.json``."""
    validations = [entry for entry in _entries(RUNS / "chatflow") if "validation" in entry]
    first, last = validations[0]["validation"], validations[-1]["validation"]
    speeds = sorted(e["tokens_per_second"] for e in _iterations(RUNS / "chatflow").values())
    summary = {
        "validation": {
            name: {"before": first[name]["bits_per_byte"], "after": last[name]["bits_per_byte"]}
            for name in first
        },
        "killed_at": killed_at,
        "resumed_at": resumed_at,
        "tokens_per_second": speeds[len(speeds) // 2],
    }
    write_output_file(RUNS / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def print_table(summary: dict[str, Any]) -> None:
    """Prints the validation results before and after the ChatFlow run."""
    announce("validation, bits per byte")
    print(f"{'source':12} {'before':>8} {'after':>8} {'change':>8}")
    for name, row in summary["validation"].items():
        change = row["after"] / row["before"] - 1
        print(f"{name:12} {row['before']:8.3f} {row['after']:8.3f} {100 * change:+7.1f}%")
    print(f"median speed: {summary['tokens_per_second']:.0f} tokens/s")


if __name__ == "__main__":
    run_main(main)
