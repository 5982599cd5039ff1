"""Encodes the documents of a chunk to token ids and loss masks, in a thread or process.

Adjacent text segments with the same loss flag are encoded together. All other segments are encoded
separately, so that no token is partly with and partly without loss. Text that follows text is
encoded as its continuation, without an additional space. Text that follows a control token is
encoded as at the beginning of a document.
"""

import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from multiprocessing.connection import wait
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from megatron_chatflow.data.indexed import optimal_dtype
from megatron_chatflow.preprocess.dedup import hashes_of
from megatron_chatflow.preprocess.parse import parse_chunk
from megatron_chatflow.preprocess.readers import Chunk
from megatron_chatflow.preprocess.settings import PreprocessSettings
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer
from megatron_chatflow.tokenizer.documents import Document, ParsedChunk, Segment


@dataclass
class EncodedDocuments:
    """Documents of one output key."""

    tokens: npt.NDArray[Any]  # the concatenated documents, 1-D, in the dataset's dtype
    lengths: npt.NDArray[np.int32]  # int32[num_documents], number of tokens of each document
    # uint8, same shape as `tokens`, 1 for tokens with loss; None for plain text
    loss_mask: npt.NDArray[np.uint8] | None
    # int64[num_documents], size of each document's text in UTF-8 bytes; or int64[1], the total
    # size, if native code parsed the lines
    text_bytes: npt.NDArray[np.int64]
    # uint64[num_documents, 2 * num_hashes], the hashes of each document's text or keys; None if
    # duplicates stay
    hashes: npt.NDArray[np.uint64] | None
    num_dropped: dict[str, int]  # number of dropped documents by reason
    num_repaired: dict[str, int]  # number of documents kept after a change, by kind

    def keep(self, kept: npt.NDArray[np.bool_], reason: str) -> None:
        """Drops the documents that are False in ``kept``, bool[num_documents], and counts them."""
        if kept.all():
            return
        of_tokens = np.repeat(kept, self.lengths)
        self.tokens = self.tokens[of_tokens]
        if self.loss_mask is not None:
            self.loss_mask = self.loss_mask[of_tokens]
        self.lengths, self.text_bytes = self.lengths[kept], self.text_bytes[kept]
        self.hashes = None if self.hashes is None else self.hashes[kept]
        self.num_dropped[reason] = self.num_dropped.get(reason, 0) + int((~kept).sum())


@dataclass
class EncodedChunk:
    """The result of parsing and encoding a chunk, by output key.

    The documents of `parsed` have been removed, and `num_bytes_read` is that of the `Chunk`.
    """

    documents: dict[str, EncodedDocuments]
    parsed: ParsedChunk
    num_bytes_read: int


def encode_segments(
    tokenizer: Tokenizer, segments: Sequence[Segment], *, append_bos: bool = False
) -> tuple[list[int], list[int], list[int]]:
    """Encodes the segments of a document.

    An "end" segment that directly follows an end-of-sequence token adds no token. With
    ``append_bos``, the ids begin with BOS, without loss.

    Returns:
        A tuple of three lists: the ids; the loss mask, which is 1 for each id with loss and 0
        otherwise; and for each segment, the number of ids up to its end. Segments that are encoded
        together have the same end.
    """
    ids: list[int] = []
    loss_mask: list[int] = []
    ends: list[int] = []
    follows_text = False
    resolved = [(segment, _token_id(tokenizer, segment)) for segment in segments]
    for (token_id, loss), group in groupby(resolved, lambda item: (item[1], item[0].loss)):
        members = [segment for segment, _ in group]
        if token_id is None:
            encode = tokenizer.encode_continuation if follows_text else tokenizer.encode
            new_ids = encode("".join(segment.text for segment in members))
            follows_text = follows_text or bool(new_ids)
        else:
            new_ids = [token_id] * sum(
                not (segment.kind == "end" and (ids[-1:] == [token_id] or number > 0))
                for number, segment in enumerate(members)
            )
            follows_text = not tokenizer.prefixes_every_part
        ids += new_ids
        loss_mask += [int(loss)] * len(new_ids)
        ends += [len(ids)] * len(members)
    if append_bos and ids and ids[0] != tokenizer.bos_id:
        ids, loss_mask = [tokenizer.bos_id, *ids], [0, *loss_mask]
        ends = [end + 1 for end in ends]
    return ids, loss_mask, ends


def _token_id(tokenizer: Tokenizer, segment: Segment) -> int | None:
    """Returns the id of a control or end segment; None if the segment has to be encoded as text."""
    if segment.kind == "end":
        return tokenizer.eos_id
    return tokenizer.control_id(segment.text) if segment.kind == "control" else None


class ChunkWorker:
    """Parses and encodes chunks."""

    def __init__(self, settings: PreprocessSettings, tokenizer: Tokenizer) -> None:
        """Initializes the worker. The vocabulary determines the output dtype (`optimal_dtype`)."""
        self.settings = settings
        self.tokenizer = tokenizer
        self.dtype = optimal_dtype(tokenizer.vocab_size)

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Parses and encodes one chunk."""
        corpus = self.settings.corpus
        is_bounded = chunk.kind == "lines" and len(chunk.data) <= corpus.max_record_bytes
        if corpus.format == "text" and is_bounded and len(corpus.json_keys) == 1:
            (key,) = corpus.json_keys
            encoded = self._encode_lines(chunk.data, key)
            if encoded is not None:
                return EncodedChunk({key: encoded}, ParsedChunk(), chunk.num_bytes_read)
        parsed = parse_chunk(chunk, corpus)
        documents = {}
        for key, given in parsed.documents.items():
            if corpus.has_loss_mask:
                documents[key] = self._encode_segmented(cast(list[Document], given))
            else:
                documents[key] = self._encode_texts(cast(list[str], given))
        parsed.documents = {}
        return EncodedChunk(documents, parsed, chunk.num_bytes_read)

    def _encode_lines(self, data: bytes, key: str) -> EncodedDocuments | None:
        """Encodes the text under ``key`` of every JSON line in native code.

        Returns None if this path does not support the tokenizer, the lines or `dedup`.
        """
        if self.settings.dedup:
            return None  # needs the text of each document
        narrow = self.dtype == np.uint16
        encoded = self.tokenizer.encode_json_lines(data, key, self._end_id, narrow)
        if encoded is None:
            return None
        ids, lengths, num_text_bytes = encoded
        ids, lengths = self._insert_bos(ids, lengths)
        return _packed(ids, lengths, np.array([num_text_bytes]), None)

    @property
    def _end_id(self) -> int:
        return self.tokenizer.eos_id if self.settings.append_eod else -1

    def _insert_bos(
        self, ids: npt.NDArray[Any], lengths: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        """Inserts BOS before each document that has ids, if `append_bos` is set."""
        if not self.settings.append_bos:
            return ids, lengths
        has_ids = lengths > 0
        begins = (np.cumsum(lengths, dtype=np.int64) - lengths)[has_ids]
        return np.insert(ids, begins, self.tokenizer.bos_id), lengths + has_ids.astype(np.int32)

    def _encode_texts(self, texts: list[str]) -> EncodedDocuments:
        ids, lengths = self._insert_bos(*self.tokenizer.encode_arrays(texts, self._end_id))
        utf8 = [text.encode() for text, n in zip(texts, lengths.tolist(), strict=True) if n]
        text_bytes = np.array([len(text) for text in utf8], np.int64)
        hashes = hashes_of(utf8) if self.settings.dedup else None
        return _packed(ids.astype(self.dtype), lengths, text_bytes, hashes)

    def _encode_segmented(self, documents: list[Document]) -> EncodedDocuments:
        kept: list[list[int]] = []
        masks: list[list[int]] = []
        texts: list[bytes] = []
        keys: list[tuple[str, ...]] = []
        num_dropped: Counter[str] = Counter()
        num_repaired: Counter[str] = Counter()
        for document in documents:
            ids, mask, ends = encode_segments(
                self.tokenizer, document.segments, append_bos=self.settings.append_bos
            )
            num_segments = len(document.segments)
            limit = self.settings.max_tokens
            if self.settings.append_eod and ids[-1:] != [self.tokenizer.eos_id]:
                ids.append(self.tokenizer.eos_id)
                mask.append(1)
            if limit is not None and len(ids) > limit:
                fitting = [cut for cut in document.cut_points if ends[cut - 1] <= limit]
                if not fitting or self.settings.over_long == "drop":
                    num_dropped["too_long"] += 1
                    continue
                num_segments = fitting[-1]
                del ids[ends[num_segments - 1] :], mask[ends[num_segments - 1] :]
                num_repaired["truncated"] += 1
            if not any(mask):  # such as when truncation removed all answers
                num_dropped["no_loss_tokens"] += 1
                continue
            kept.append(ids)
            masks.append(mask)
            kept_segments = document.segments[:num_segments]
            texts.append("".join(segment.text for segment in kept_segments).encode())
            keys.append(document.keys)
        hashes = None
        if num_hashes := self.settings.num_hashes:
            compared = (
                texts if num_hashes == 1 else [key.encode() for group in keys for key in group]
            )
            hashes = hashes_of(compared).reshape(-1, 2 * num_hashes)
        return EncodedDocuments(
            tokens=_concatenate(kept, self.dtype),
            lengths=np.array([len(ids) for ids in kept], np.int32),
            loss_mask=_concatenate(masks, np.dtype(np.uint8)),
            text_bytes=np.array([len(text) for text in texts], np.int64),
            hashes=hashes,
            num_dropped=dict(num_dropped),
            num_repaired=dict(num_repaired),
        )


def _packed(
    ids: npt.NDArray[Any],
    lengths: npt.NDArray[np.int32],
    text_bytes: npt.NDArray[np.int64],
    hashes: npt.NDArray[np.uint64] | None,
) -> EncodedDocuments:
    """Returns text documents without those that have no ids."""
    kept = lengths[lengths > 0]  # empty documents add nothing to `ids`
    num_dropped = {"empty": len(lengths) - len(kept)} if len(kept) < len(lengths) else {}
    return EncodedDocuments(ids, kept, None, text_bytes, hashes, num_dropped, {})


def _concatenate(sequences: list[list[int]], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    arrays = [np.array(sequence, dtype) for sequence in sequences]
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)


_worker: ChunkWorker | None = None


def start_worker(settings: PreprocessSettings) -> None:
    """Initializes a worker process, which exits when its parent exits or is killed."""
    global _worker
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def exit_with_parent() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
    # The tokenizers library's own threads would compete with the other workers.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = load_tokenizer(settings.tokenizer_model, settings.tokenizer_type)
    _worker = ChunkWorker(settings, tokenizer)


def encode_in_worker(chunk: Chunk) -> EncodedChunk:
    """Parses and encodes one chunk in a process initialized by `start_worker`."""
    assert _worker is not None
    return _worker.encode(chunk)
