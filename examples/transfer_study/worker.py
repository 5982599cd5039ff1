"""A worker of the study: trains the runs that it reads from standard input, one per line.

It answers each with a line to the file descriptor that is its argument. What is printed goes to
the run's log. The process stays, so that imports are paid for once. Without torchrun it is a job of
one rank.

After the training, the weights are loaded once more and evaluated on all held-out text and with the
probes, so that the training needs to evaluate little.
"""

import gc
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_chatflow.blend.fit import NUM_PARTS, parts_of_run
from megatron_chatflow.config import RunConfig, load_config
from megatron_chatflow.config.shape import flops_per_token
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import write_output_file
from megatron_chatflow.pretrain import initialize_run, train
from megatron_chatflow.runtime.device import has_fast_bf16
from megatron_chatflow.runtime.launch import finalize
from megatron_chatflow.tokenizer import load_tokenizer


def main() -> None:
    """Serves jobs until standard input ends, or the parent does."""
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    answers = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")
    for line in sys.stdin:
        job = json.loads(line)
        log = Path(job["log"])
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            logging.basicConfig(
                level=logging.INFO,
                format="%(asctime)s %(levelname)s %(message)s",
                stream=stream,
                force=True,
            )
            logging.getLogger("megatron").setLevel(logging.WARNING)
            try:
                result = run_job(job)
            except UserError as error:
                logging.error("%s", error)
                result = {"error": str(error)}
        answers.write(json.dumps(result) + "\n")
        answers.flush()
        gc.collect()


def _exit_with_parent(parent: int) -> None:
    """Exits when the study was killed, so that no two workers train into the same folder."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def run_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """Trains one run to its end, evaluates it and returns its result.

    Raises:
        UserError: The training was stopped or fails.
    """
    folder = Path(job["folder"])
    config = _config(folder / "run.yaml", job["config"])
    begin = time.monotonic()
    train(config)
    assert config.checkpoint.save is not None
    entries = _read_metrics(Path(config.checkpoint.save))
    tokenizer = load_tokenizer(config.tokenizer.tokenizer_model, config.tokenizer.tokenizer_type)
    batch_tokens = config.train.global_batch_size * config.data.seq_length
    result = summarize(entries, batch_tokens)
    assert config.train.train_iters is not None
    if result["curve"][-1]["tokens"] != config.train.train_iters * batch_tokens:
        raise UserError(f"{folder}: the training was stopped; run the study again")
    # A run that was resumed took longer than this process.
    iterations = [entry for entry in entries if "lm_loss" in entry]
    trained = sum(entry["seconds"] * entry["interval"] for entry in iterations)
    seconds = max(time.monotonic() - begin, trained)
    begin = time.monotonic()
    result |= evaluate(_config(folder / "evaluation.yaml", job["evaluation"]))
    after = time.monotonic() - begin
    flops = flops_per_token(config.model, tokenizer.vocab_size, config.data.seq_length)
    cores = 1 if torch.cuda.is_available() else torch.get_num_threads()
    return {
        **result,
        "flops": int(flops) * result["tokens"],
        "seconds": round(seconds + after, 1),
        "training_seconds": round(trained, 1),
        "core_seconds": round((seconds + after) * cores, 1),
        "device": device_name(),
        "bf16": config.train.bf16,
    }


def evaluate(config: RunConfig) -> dict[str, Any]:
    """Evaluates the initial weights of a run on its held-out text and probes, and hashes them."""
    assert config.checkpoint.save is not None
    folder = Path(config.checkpoint.save)
    shutil.rmtree(folder, ignore_errors=True)  # of an evaluation that was interrupted
    try:
        ranks = initialize_run(config)
        # These import megatron-core, which must come after `initialize_run` on CPUs.
        from megatron_chatflow.training.build import build_run
        from megatron_chatflow.training.loop import validate

        with ExitStack() as stack:
            run, state = build_run(config, ranks, stack)
            validate(run, state)
            for callback in run.callbacks:
                callback.on_evaluate(run, state)
            weights = digest_of_weights(run.optimization.chunks)
    finally:
        finalize()
    entries = _read_metrics(folder)
    validation = next(entry["validation"] for entry in entries if "validation" in entry)
    probes = [entry for entry in entries if "probes" in entry]
    return {
        "final": {name: one["bits_per_byte"] for name, one in validation.items()},
        "probes": probes[0]["probes"] if probes else {},
        "probe_seconds": round(sum(entry["probe_seconds"] for entry in probes), 1),
        "weights": weights,
    }


def digest_of_weights(chunks: Iterable[torch.nn.Module]) -> str:
    """Returns a hash of names and values, as fp32."""
    digest = hashlib.sha256()
    for chunk in chunks:
        for name, weight in sorted(chunk.named_parameters()):
            digest.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def device_name() -> str:
    """Returns the name of the GPU or CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def _config(path: Path, content: Mapping[str, Any]) -> RunConfig:
    """Writes and reads a configuration; in fp32 on a CPU without fast bf16."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not has_fast_bf16(device):
        content = {**content, "train": {**content["train"], "bf16": False}}
    write_output_file(path, yaml.safe_dump(dict(content), sort_keys=False))
    return load_config(path)


def _read_metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def summarize(entries: list[dict[str, Any]], batch_tokens: int) -> dict[str, Any]:
    """Returns the curve of a run's validations, and what it read at which learning rates.

    Args:
        entries: Lines of ``metrics.jsonl``.
        batch_tokens: Tokens of an iteration.
    """
    curve = [
        {
            "tokens": entry["iteration"] * batch_tokens,
            "bits_per_byte": {
                name: one["bits_per_byte"] for name, one in entry["validation"].items()
            },
        }
        for entry in entries
        if "validation" in entry
    ]
    last = [entry for entry in entries if "lm_loss" in entry][-1]
    return {
        "tokens": last["consumed_tokens"],
        "tokens_by_source": {
            name: one["tokens"] for name, one in last["sources"].items() if one["tokens"]
        },
        "curve": curve,
        "trajectory": parts_of_run(entries, NUM_PARTS),
    }


if __name__ == "__main__":
    main()
