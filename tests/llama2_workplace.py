"""A working folder for the commands of the LLaMA-2 example."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tiny_run import TinyRun, write_dataset

from megatron_chatflow.checkpoint.files import LATEST, iteration_folder
from megatron_chatflow.checkpoint.store import RunState
from megatron_chatflow.config import load_config
from megatron_chatflow.convert.shape import LlamaShape
from megatron_chatflow.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_chatflow.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]

FOLDER = ROOT / "examples" / "llama2_7b"


def make_workplace(folder: Path, tiny_run: TinyRun) -> Path:
    """Creates made-up data below ``folder`` at the paths of the page's configurations."""
    (folder / "data").mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    model = folder / "data" / "tokenizer.model"
    model.write_bytes(tiny_run.tokenizer_model.read_bytes())
    for part in ("", "_valid"):
        for source in ("en{}_text", "zh{}_text", "zh_en{}_text", "chat{}_messages"):
            prefix = folder / "data" / f"{source.format(part)}_document"
            write_dataset(prefix, model, seed=2, num_documents=400)
            if source.startswith("chat"):
                mask = IndexedDatasetWriter(
                    Path(str(prefix).removesuffix("_document") + "_loss_mask"), np.uint8
                )
                data = IndexedDataset(prefix)
                for index in range(len(data)):
                    mask.add_document(np.ones(len(data[index]), np.uint8))
                mask.finalize()
    for size in ("7b", "13b", "70b"):
        write_weights(folder, size)
    return folder


def write_weights(folder: Path, size: str) -> None:
    """Writes the state of the checkpoint that a size starts from. A dry run reads no tensors."""
    settings = load_config(FOLDER / f"{size}.yaml").checkpoint
    assert settings.pretrained_checkpoint is not None
    checkpoint = iteration_folder(folder / settings.pretrained_checkpoint, 0)
    model = load_config(FOLDER / f"{size}.yaml").model
    shape = LlamaShape.of(model, load_tokenizer(folder / "data" / "tokenizer.model").vocab_size)
    checkpoint.mkdir(parents=True)
    state = RunState(0, 0, 0, {}, {}, {}, {}, shape.recorded())
    (checkpoint / "state.json").write_text(json.dumps(asdict(state)))
    (checkpoint.parent / LATEST).write_text("0\n")
