"""Runs small preprocessing jobs for the tests."""

import json
from pathlib import Path
from typing import Any

from megatron_chatflow.data.indexed import IndexedDataset
from megatron_chatflow.data.sidecar import loss_mask_prefix
from megatron_chatflow.preprocess import PreprocessSettings, preprocess
from megatron_chatflow.preprocess.settings import CorpusSettings


def make_chats(folder: Path, model: Path) -> Path:
    """Preprocesses three equal chats; returns the dataset's prefix."""
    (folder / "a.jsonl").write_text('{"instruction": "bana?", "output": "kedo luno"}\n' * 3)
    settings = PreprocessSettings(
        inputs=(str(folder / "a.jsonl"),),
        output_prefix=str(folder / "a"),
        tokenizer_model=str(model),
        corpus=CorpusSettings(format="chat", json_keys=("messages",)),
    )
    preprocess(settings)
    return folder / "a_messages_document"


def write_lines(folder: Path, *names: str) -> None:
    """Writes files of one record each, in folders that are created."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b'{"text": "a"}\n')


class Jobs:
    """Runs preprocessing jobs in one folder with one tokenizer."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.model = model
        self.prefix = folder / "out"

    def lines(self, name: str, records: list[Any]) -> str:
        """Writes records as JSON lines. Records of type bytes are written unchanged."""
        path = self.folder / name
        lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
        path.write_bytes(b"\n".join(lines) + b"\n")
        return str(path)

    def run(self, *inputs: str, corpus: CorpusSettings | None = None, **options: Any) -> Any:
        """Runs a job and returns the sidecar of the first key."""
        settings = PreprocessSettings(
            inputs=inputs,
            output_prefix=str(self.prefix),
            tokenizer_model=str(self.model),
            corpus=corpus or CorpusSettings(),
            **{"overwrite": True, **options},
        )
        return next(iter(preprocess(settings).values()))

    def documents(self, key: str = "text") -> list[list[int]]:
        """Returns the token ids that the last job wrote."""
        dataset = IndexedDataset(f"{self.prefix}_{key}_document")
        return [dataset[i].tolist() for i in range(len(dataset))]

    def masks(self, key: str = "text") -> list[list[int]]:
        """Returns the loss masks that the last job wrote."""
        dataset = IndexedDataset(loss_mask_prefix(f"{self.prefix}_{key}_document"))
        return [dataset[i].tolist() for i in range(len(dataset))]
