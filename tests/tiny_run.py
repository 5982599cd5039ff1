"""Creates a run that is small enough for a test: text, tokenizer, datasets and configuration.

`make_tiny_run` returns a `TinyRun`. The real entry point trains its YAML file within seconds.
"""

import io
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import yaml

from megatron_chatflow.checkpoint.files import iteration_folder
from megatron_chatflow.config import RunConfig
from megatron_chatflow.data.indexed import IndexedDatasetWriter
from megatron_chatflow.files import write_atomically
from megatron_chatflow.tokenizer import load_tokenizer

VOCAB_SIZE = 600


def made_up_sentences(num_sentences: int, seed: int) -> list[str]:
    """Returns sentences of invented words.

    Common words are frequent, and each has a usual successor.
    """
    rng = random.Random(seed)
    shared = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(shared.choices(letters, k=shared.randint(2, 7))) for _ in range(300)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    successors = shared.choices(range(len(words)), weights=weights, k=len(words))
    sentences = []
    for _ in range(num_sentences):
        word = rng.choices(range(len(words)), weights=weights)[0]
        chosen = [word]
        for _ in range(rng.randint(3, 60)):
            follows = rng.random() < 0.6
            word = successors[word] if follows else rng.choices(range(len(words)), weights)[0]
            chosen.append(word)
        sentences.append(" ".join(words[w] for w in chosen) + ".")
    return sentences


@dataclass(frozen=True)
class TinyRun:
    """Paths of a made-up run.

    Attributes:
        folder: The folder that contains all other paths.
        config: The YAML file.
        tokenizer_model: A SentencePiece model with LLaMA's control ids.
    """

    folder: Path
    config: Path
    tokenizer_model: Path


def train_tokenizer(path: Path) -> Path:
    """Trains a byte-fallback BPE model with LLaMA's control ids on made-up text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(made_up_sentences(400, seed=1)),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


def write_dataset(prefix: Path, model: Path, *, seed: int, num_documents: int) -> None:
    """Writes made-up documents, each followed by EOD."""
    tokenizer = load_tokenizer(model)
    writer = IndexedDatasetWriter(prefix, np.uint16)
    for text in made_up_sentences(num_documents, seed):
        writer.add_document(np.array([*tokenizer.encode(text), tokenizer.eos_id], np.uint16))
    writer.finalize()


def make_tiny_run(folder: Path) -> TinyRun:
    """Creates a tokenizer, two datasets and a configuration below ``folder``."""
    model = train_tokenizer(folder / "tokenizer.model")
    write_dataset(folder / "first_text_document", model, seed=2, num_documents=400)
    write_dataset(folder / "second_text_document", model, seed=3, num_documents=300)
    config = folder / "run.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "model": {
                    "num_layers": 4,
                    "hidden_size": 64,
                    "ffn_hidden_size": 176,
                    "num_attention_heads": 4,
                    "num_query_groups": 2,
                    "max_position_embeddings": 128,
                    "init_method_std": 0.1,
                },
                "tokenizer": {"tokenizer_model": str(model)},
                "data": {
                    "seq_length": 64,
                    "holdout_every": 50,
                    "sources": {
                        "first": {"paths": [str(folder / "first_text_document")]},
                        "second": {
                            "paths": [str(folder / "second_text_document")],
                            "packing": "best_fit",
                            "boundaries": "isolate",
                        },
                    },
                    "schedule": {
                        "knots": [
                            {"at": 0, "weights": {"first": 0.9, "second": 0.1}},
                            {"at": 64, "weights": {"first": 0.2, "second": 0.8}, "ramp": "linear"},
                        ]
                    },
                },
                "optimizer": {"lr": 3e-3, "lr_warmup_iters": 1},
                "train": {
                    "train_iters": 10,
                    "micro_batch_size": 2,
                    "global_batch_size": 8,
                    "bf16": False,
                    "eval_interval": 5,
                    "eval_iters": 1,
                },
            }
        )
    )
    return TinyRun(folder, config, model)


def write_checkpoint_state(config: RunConfig, folder: Path, **state: Any) -> None:
    """Writes into a run's folder the files that iteration 5 would save beside its tensors."""
    from megatron_chatflow.training.inputs import open_inputs

    inputs = open_inputs(config)
    samples = 5 * config.train.global_batch_size
    changed = {"blend": inputs.blend.state_at(samples), **state}
    saved = replace(inputs.state, iteration=5, consumed_samples=samples, **changed)
    checkpoint = iteration_folder(folder, 5)
    checkpoint.mkdir(parents=True)
    write_atomically(checkpoint / "state.json", json.dumps(vars(saved)))
    write_atomically(checkpoint / "config.yaml", config.to_yaml())
    write_atomically(folder / "latest_checkpointed_iteration.txt", "5\n")
