"""What a thread or process does to turn chunks of input into token ids.

In: the job's settings, once; then chunks. Out: for each chunk an `EncodedChunk`.
"""

import multiprocessing
import os
import threading
from multiprocessing.connection import wait

from megatron_chatflow.corpus.documents import ParsedChunk
from megatron_chatflow.corpus.parse import parse_chunk
from megatron_chatflow.corpus.readers import Chunk
from megatron_chatflow.data.preprocess.encode import DocumentEncoder, EncodedChunk
from megatron_chatflow.data.preprocess.settings import PreprocessSettings
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer


class ChunkWorker:
    """Parses and encodes chunks."""

    def __init__(self, settings: PreprocessSettings, tokenizer: Tokenizer) -> None:
        """Takes the job and its tokenizer."""
        self.settings = settings
        self.encoder = DocumentEncoder(tokenizer, settings)

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """One chunk."""
        corpus = self.settings.corpus
        is_bounded = chunk.kind == "lines" and len(chunk.data) <= corpus.max_record_bytes
        if corpus.format == "text" and is_bounded and len(corpus.json_keys) == 1:
            (key,) = corpus.json_keys
            encoded = self.encoder.encode_lines(chunk.data, key)
            if encoded is not None:
                return EncodedChunk({key: encoded}, ParsedChunk(), chunk.num_bytes_read)
        parsed = parse_chunk(chunk, corpus)
        documents = {key: self.encoder.encode(docs) for key, docs in parsed.documents.items()}
        parsed.documents = {}
        return EncodedChunk(documents, parsed, chunk.num_bytes_read)


_worker: ChunkWorker | None = None


def start_worker(settings: PreprocessSettings) -> None:
    """Makes this process a worker that ends when its parent does, however that ends."""
    global _worker
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def end_with_parent() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    # One of several workers: the library's own threads would compete with the others.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = load_tokenizer(settings.tokenizer_model, settings.tokenizer_type)
    _worker = ChunkWorker(settings, tokenizer)


def encode_in_worker(chunk: Chunk) -> EncodedChunk:
    """One chunk, in a process that `start_worker` has prepared."""
    assert _worker is not None
    return _worker.encode(chunk)
