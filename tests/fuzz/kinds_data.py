"""Defines the kinds for datasets, their loss masks and sidecars, and the metrics of a run."""

import json
import random
import re
from pathlib import Path

import orjson
import yaml
from made_up_text import made_up_sentences

from fuzz.case import Command, Damage, Kind
from fuzz.kinds_text import CHATS, copy_tokenizers, preprocess, write_lines
from fuzz.mutations import JSON_TOKENS, mutate_bytes, mutate_json, mutate_text

_MADE = "chat_messages_document"
_MASK = "chat_messages_loss_mask"
_PARTS = [f"part0000{k}of00002_messages" for k in range(2)]


# Datasets and sidecars


def _make_dataset(folder: Path) -> None:
    """Creates two parts of a chat job with `--dedup`, the whole job, and a run that reads it."""
    copy_tokenizers(folder)
    answers = made_up_sentences(60, seed=5)
    chats = [{"instruction": f"bana {k}", "output": text} for k, text in enumerate(answers)]
    write_lines(folder / "a.jsonl", [*CHATS[:12], *chats[:40]])
    write_lines(folder / "b.jsonl", chats[30:])
    for prefix, more in (
        ("chat", ()),
        ("out", ("--dedup", "--shard", "0/2")),
        ("out", ("--dedup", "--shard", "1/2")),
    ):
        arguments = preprocess("--input", "a.jsonl", "b.jsonl", "--format", "chat", *more)
        Command("", (*arguments, "--output-prefix", prefix)).call_to_end()
    source = {"paths": [_MADE], "loss": "response"}
    run = {
        "model": {
            "num_layers": 1,
            "hidden_size": 16,
            "ffn_hidden_size": 24,
            "num_attention_heads": 2,
            "max_position_embeddings": 128,
        },
        "tokenizer": {"tokenizer_model": "tokenizer.model"},
        "data": {
            "seq_length": 128,
            "sources": {
                "windows": source,
                "packed": {**source, "packing": "best_fit", "boundaries": "isolate"},
            },
            "schedule": {"knots": [{"at": 0, "weights": {"windows": 1, "packed": 1}}]},
        },
        "optimizer": {"lr": 1e-3},
        "train": {
            "train_iters": 1,
            "micro_batch_size": 2,
            "global_batch_size": 2,
            "bf16": False,
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))


def _damage_dataset(folder: Path, rng: random.Random) -> Damage:
    prefix = rng.choice([_MADE, _MASK, f"out_{_PARTS[0]}_document", f"out_{_PARTS[1]}_loss_mask"])
    path = folder / f"{prefix}{rng.choice(['.bin', '.idx'])}"
    content, how = mutate_bytes(path.read_bytes(), rng)
    path.write_bytes(content)
    return Damage(path.name, how)


def _damage_sidecar(folder: Path, rng: random.Random) -> Damage:
    name = rng.choice(
        [f"{_MADE}.json", f"out_{_PARTS[0]}_document.json", f"out_{_PARTS[1]}_document.hashes"]
    )
    path = folder / name
    mutate = mutate_bytes if name.endswith(".hashes") else mutate_json
    content, how = mutate(path.read_bytes(), rng)
    path.write_bytes(content)
    return Damage(name, how)


def _is_hashed(damage: Damage) -> bool:
    """Returns whether a hash covers the damage.

    A sidecar has the hashes of `.bin`, of `.idx` and of the mask's `.bin`.
    """
    return not damage.file.endswith("_loss_mask.idx")


def _check_merged(folder: Path, damage: Damage) -> None:
    """Checks that the merged dataset passes the inspection that reads all of it."""
    from megatron_chatflow.preprocess.inspect import Inspection

    Inspection(folder / "all_messages_document").check_hashes()


_MERGED = tuple(f"all_messages_document.{suffix}" for suffix in ("bin", "idx"))
_MERGED_MASK = ("all_messages_loss_mask.bin", "all_messages_loss_mask.idx")
_CACHES = ("*packing*", "*.cache*")


def _commands(*, is_covered: bool) -> list[Command]:
    covered = _is_hashed if is_covered else (lambda damage: False)
    parts = [f"out_{part}_document" for part in _PARTS]
    own, of_parts = ["chat_*"], ["out_*"]
    return [
        Command(
            "inspect",
            ("inspect_dataset.py", _MADE, "--tokenizer-model", "tokenizer.model"),
            is_covered=covered,
            reads=own,
        ),
        Command(
            "compare",
            ("inspect_dataset.py", _MADE, parts[0]),
            statuses=(0, 1, 2),
            is_covered=covered,
        ),
        Command(
            "merge",
            ("merge_datasets.py", "--input", _MADE, "--output-prefix", "all_messages_document"),
            outputs=(*_MERGED, *_MERGED_MASK, "all_messages_document.json"),
            compared=("all_*.bin", "all_*.idx"),
            is_covered=covered,
            reads=own,
            check=_check_merged,
        ),
        Command(
            "merge parts",
            ("merge_datasets.py", "--input", *parts, "--output-prefix", "all_messages_document"),
            outputs=(*_MERGED, *_MERGED_MASK, "all_messages_document.json"),
            compared=("all_*.bin", "all_*.idx"),
            is_covered=covered,
            reads=of_parts,
            check=_check_merged,
        ),
        Command(
            "dry run",
            ("megatron_chatflow.pretrain", "--config", "run.yaml", "--dry-run"),
            may_write=_CACHES,
            is_covered=covered,
            reads=own,
        ),
    ]


DATASET = Kind(
    "dataset", _make_dataset, _damage_dataset, _commands(is_covered=True), needs=["tokenizer"]
)
SIDECAR = Kind(
    "sidecar", _make_dataset, _damage_sidecar, _commands(is_covered=False), needs=["tokenizer"]
)


# Metrics


def _make_metrics(folder: Path) -> None:
    rng = random.Random(0)
    lines = []
    for iteration in range(1, 41):
        block = {"loss": 5 - iteration / 20, "tokens": 512, "weight": 0.5, "epoch": 0.1}
        line = {
            "iteration": iteration,
            "consumed_samples": 8 * iteration,
            "time": 1.7e9 + iteration,
            "lm_loss": 5 - iteration / 20 + rng.random() / 10,
            "grad_norm": rng.random(),
            "learning_rate": 1e-3,
            "tokens_per_second": 1e4,
            "num_restarts": iteration // 20,
            "seconds_lost": 3.0 * (iteration // 20),
            "sources": {"first": block, "名字": block},
        }
        lines.append(line)
        if iteration % 10 == 0:
            lines.append(
                {"iteration": iteration, "validation": {"first": {"loss": 4.0, "tokens": 64}}}
            )
    run = folder / "run"
    run.mkdir()
    write_lines(run / "metrics.jsonl", lines)
    restart = {"attempt": 1, "iteration": 20, "seconds_lost": 3.0, "reason": "killed"}
    write_lines(run / "restarts.jsonl", [restart])
    (run / "status.json").write_text(json.dumps({"status": "running", "iteration": 40}))
    config = {"train": {"train_iters": 50, "global_batch_size": 8}, "data": {"seq_length": 64}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def _damage_metrics(folder: Path, rng: random.Random) -> Damage:
    name = rng.choice(["metrics.jsonl"] * 4 + ["restarts.jsonl", "status.json", "config.yaml"])
    path = folder / "run" / name
    way = rng.random()
    if name != "config.yaml" and way < 0.6:
        lines = path.read_bytes().splitlines()
        how = ""
        for at in rng.sample(range(len(lines)), min(len(lines), rng.choice([1, 1, 5]))):
            lines[at], how = mutate_json(lines[at], rng)
        content = b"\n".join(lines) + b"\n"
    elif way < 0.8:
        content, how = mutate_text(path.read_bytes(), rng, JSON_TOKENS)
    else:
        content, how = mutate_bytes(path.read_bytes(), rng)
    path.write_bytes(content)
    return Damage(f"run/{name}", how)


def _check_page(folder: Path, damage: Damage) -> None:
    """Checks that the page is complete and loads nothing."""
    page = (folder / "page.html").read_text()
    figures = re.compile(r'<script type="application/json">(.*?)</script>', re.DOTALL)
    for figure in figures.findall(page):
        orjson.loads(figure)  # NaN is refused
    text = figures.sub("", page)
    if not page.endswith("</html>\n") or "NaN" in text.split("<script>")[0].split("<pre>")[0]:
        raise AssertionError("the page is cut or shows NaN")


METRICS = Kind(
    "metrics",
    _make_metrics,
    _damage_metrics,
    [
        Command(
            "report",
            ("plot_run.py", "run", "--output", "page.html"),
            outputs=["page.html"],
            check=_check_page,
        )
    ],
)

KINDS = [DATASET, SIDECAR, METRICS]
