"""Steps that the examples' drivers share: fetching, preprocessing, running tools and trainings.

The output of every command goes to the terminal. A command that fails ends the driver.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime.device import has_fast_bf16

ROOT = Path(__file__).resolve().parents[1]
CORPUS = Path(".demo/corpus")
SOURCES: dict[str, tuple[str, ...]] = {
    "english": ("--json-keys", "text"),
    "chinese": ("--json-keys", "text"),
    "parallel": ("--format", "pairs", "--pair-direction", "both"),
    # A chat has to fit the 512 inputs of a sample and the label after them.
    "instruction": ("--format", "chat", "--max-tokens", "513"),
}


def announce(title: str) -> None:
    """Prints the title of a step."""
    print(f"\n== {title}", flush=True)


def run_tool(name: str, *arguments: object) -> None:
    """Runs one of the project's tools.

    Raises:
        UserError: The tool fails.
    """
    announce(" ".join(["tools/" + name, *map(str, arguments)]))
    command = [sys.executable, f"tools/{name}", *map(str, arguments)]
    if subprocess.run(command, check=False).returncode:
        raise UserError(f"tools/{name} failed, see above")


def pretrain_command(config: Path, *flags: object) -> list[str]:
    """Returns the command line of a run on two ranks, in fp32 on a CPU without fast bf16."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [
        *launch,
        "-m",
        "megatron_chatflow.pretrain",
        "--config",
        *map(str, (config, *flags)),
        *([] if has_fast_bf16(device) else ["--no-bf16"]),
    ]


def pretrain(title: str, config: Path, *flags: object) -> None:
    """Runs a training on two ranks to its end.

    Raises:
        UserError: The training fails.
    """
    announce(title)
    if subprocess.run(pretrain_command(config, *flags), check=False).returncode:
        raise UserError(f"{title}: failed, see above")


def fetch_corpus(is_small: bool) -> None:
    """Fetches the corpus unless it is present."""
    if (CORPUS / "manifest.json").exists():
        announce(f"{CORPUS}: the corpus is present")
        return
    run_tool("fetch_demo_corpus.py", "--output-dir", CORPUS, *(["--small"] if is_small else []))


def preprocess(source: str, split: str, prefix: Path, tokenizer_flags: Sequence[object]) -> None:
    """Converts a split of a source to an indexed dataset unless that is present.

    Args:
        source: A name in `SOURCES`.
        split: "train" or "valid".
        prefix: The prefix of the dataset's file names.
        tokenizer_flags: The flags of `preprocess_data.py` that name the tokenizer.
    """
    if list(prefix.parent.glob(f"{prefix.name}_[tm]e*_document.json")):
        return
    run_tool(
        "preprocess_data.py",
        *("--input", CORPUS / f"{source}.{split}.jsonl"),
        *("--output-prefix", prefix),
        *tokenizer_flags,
        *("--append-eod", "--workers", 2),
        *SOURCES[source],
    )
