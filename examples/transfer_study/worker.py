"""A worker of the study: trains the runs that it reads from standard input, one per line.

It answers each with a line on standard output; everything else goes to the run's log. The process
stays, so that imports are paid for once. Without torchrun it is a job of one rank.
"""

import gc
import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_chatflow.blend.fit import NUM_PARTS, parts_of_run
from megatron_chatflow.config import load_config
from megatron_chatflow.config.shape import flops_per_token
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import write_output_file
from megatron_chatflow.pretrain import train
from megatron_chatflow.tokenizer import load_tokenizer


def main() -> None:
    """Serves jobs until standard input ends, or the parent does."""
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
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
    path = folder / "run.yaml"
    write_output_file(path, yaml.safe_dump(job["config"], sort_keys=False))
    config = load_config(path)
    begin = time.process_time()
    train(config)
    assert config.checkpoint.save is not None
    run = Path(config.checkpoint.save)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer = load_tokenizer(config.tokenizer.tokenizer_model, config.tokenizer.tokenizer_type)
    batch_tokens = config.train.global_batch_size * config.data.seq_length
    result = summarize([json.loads(line) for line in lines], batch_tokens)
    assert config.train.train_iters is not None
    if result["curve"][-1]["tokens"] != config.train.train_iters * batch_tokens:
        raise UserError(f"{folder}: the training was stopped; run the study again")
    flops = flops_per_token(config.model, tokenizer.vocab_size, config.data.seq_length)
    result["flops"] = int(flops) * result["tokens"]
    result["core_seconds"] = round(time.process_time() - begin, 1)
    return result


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
    probes = [
        {"tokens": entry["iteration"] * batch_tokens, "results": entry["probes"]}
        for entry in entries
        if "probes" in entry
    ]
    return {
        "tokens": last["consumed_tokens"],
        "tokens_by_source": {
            name: one["tokens"] for name, one in last["sources"].items() if one["tokens"]
        },
        "final": curve[-1]["bits_per_byte"],
        "curve": curve,
        **({"probes": probes[-1]["results"], "probe_curve": probes} if probes else {}),
        "trajectory": parts_of_run(entries, NUM_PARTS),
    }


if __name__ == "__main__":
    main()
