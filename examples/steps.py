"""What the examples' drivers share: where text lies, and how a step is announced and run.

In: a tool's name and arguments, or a run's configuration. Out: that tool's output on the terminal;
a tool that fails ends the driver with one line.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_chatflow.errors import UserError

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
    """Announces a step."""
    print(f"\n== {title}", flush=True)


def tool(name: str, *arguments: object) -> None:
    """Runs one of the project's tools; ends the driver if it fails."""
    announce(" ".join(["tools/" + name, *map(str, arguments)]))
    command = [sys.executable, f"tools/{name}", *map(str, arguments)]
    if subprocess.run(command, check=False).returncode:
        raise UserError(f"tools/{name} failed, see above")


def pretrain_command(config: Path, *flags: object) -> list[str]:
    """The command line of a run on two ranks."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [
        *launch,
        "-m",
        "megatron_chatflow.pretrain",
        "--config",
        *map(str, (config, *flags)),
    ]


def pretrain(title: str, config: Path, *flags: object) -> None:
    """Runs a training to its end on two ranks; ends the driver if it fails."""
    announce(title)
    if subprocess.run(pretrain_command(config, *flags), check=False).returncode:
        raise UserError(f"{title}: failed, see above")


def fetch_corpus(is_small: bool) -> None:
    """Brings the text; what is there already is not fetched again."""
    if (CORPUS / "manifest.json").exists():
        announce(f"the corpus is in {CORPUS} already")
        return
    tool("fetch_demo_corpus.py", "--output-dir", CORPUS, *(["--small"] if is_small else []))


def tokenise(source: str, part: str, prefix: Path, tokenizer_flags: Sequence[object]) -> None:
    """Turns a part of a source into an indexed dataset, unless it is there.

    Args:
        source: A name in `SOURCES`.
        part: "train" or "valid".
        prefix: What the dataset's file names begin with.
        tokenizer_flags: Which tokenizer, as `preprocess_data.py` takes it.
    """
    if list(prefix.parent.glob(f"{prefix.name}_[tm]e*_document.json")):
        return
    tool(
        "preprocess_data.py",
        *("--input", CORPUS / f"{source}.{part}.jsonl"),
        *("--output-prefix", prefix),
        *tokenizer_flags,
        *("--append-eod", "--workers", 2),
        *SOURCES[source],
    )
