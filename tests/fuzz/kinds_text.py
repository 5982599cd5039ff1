"""Defines the kinds for tokenizers, configurations, chat templates and preprocessing inputs."""

import gzip
import io
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from made_up_text import made_up_sentences

from fuzz.case import Command, Damage, Kind
from fuzz.mutations import (
    JSON_TOKENS,
    mutate_bytes,
    mutate_json,
    mutate_object,
    mutate_text,
)
from fuzz.sandbox import Limits

TEXTS = [
    *made_up_sentences(12, seed=3),
    "",
    " ",
    "a  b\n\n\tc",
    "名 \u00e9e\u0301 \U0001f9ff",
    "x" * 300,
]


def preprocess(*arguments: str, tokenizer: str = "tokenizer.model") -> tuple[str, ...]:
    """Returns the command line of a job that writes `out_*`."""
    common = ("--output-prefix", "out", "--tokenizer-model", tokenizer, "--workers", "1")
    return ("preprocess_data.py", *arguments, *common)


def write_tokenizers(folder: Path) -> None:
    """Trains `tokenizer.model`, and `bpe/tokenizer.json` with its configuration."""
    import tokenizers
    from tiny_run import train_tokenizer

    train_tokenizer(folder / "tokenizer.model")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(made_up_sentences(300), trainer)
    (folder / "bpe").mkdir()
    model.save(str(folder / "bpe" / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|endoftext|>", "special": True},
        "pad_token": None,
        "add_bos_token": True,
        "model_max_length": 512,
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True}},
    }
    (folder / "bpe" / "tokenizer_config.json").write_text(json.dumps(settings))


def copy_tokenizers(folder: Path) -> None:
    """Copies the corpus of the tokenizers beside the files of another kind."""
    import shutil

    shutil.copytree(folder.parent / "tokenizer", folder, dirs_exist_ok=True)


def write_lines(path: Path, records: Sequence[Any]) -> None:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


CHATS: list[Any] = [
    {"messages": [{"role": r, "content": f"bana {k} {r}"} for r in ("system", "user", "assistant")]}
    for k in range(12)
]
CHATS += [{"instruction": f"kedo {k}", "input": "", "output": "luno " * 5} for k in range(6)]
CHATS += [{"conversations": [{"from": "human", "value": "pan"}, {"from": "gpt", "value": "fes"}]}]
PAIRS = [{"en": f"bana kedo {k}", "zh": f"名字{k}"} for k in range(20)]


# Tokenizers


def _make_tokenizer(folder: Path) -> None:
    write_tokenizers(folder)
    write_lines(folder / "text.jsonl", [{"text": text} for text in TEXTS])


def _damage_tokenizer(folder: Path, rng: random.Random) -> Damage:
    name = rng.choice(
        ["tokenizer.model", "bpe/tokenizer.json", "bpe/tokenizer.json", "bpe/tokenizer_config.json"]
    )
    path = folder / name
    if name == "tokenizer.model":
        changed, how = _mutate_sentencepiece(path.read_bytes(), rng)
    elif name.endswith("tokenizer.json") and rng.random() < 0.4:
        changed, how = _mutate_tokenizer_json(path.read_bytes(), rng)
    else:
        changed, how = mutate_json(path.read_bytes(), rng)
    path.write_bytes(changed)
    return Damage(name, how)


def _mutate_sentencepiece(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Changes fields or bytes of the model's protobuf message."""
    if rng.random() < 0.5:
        return mutate_bytes(content, rng)
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    what = rng.choice(
        ["special id", "score", "type", "piece", "drop", "swap", "normalizer", "size"]
    )
    piece = rng.choice(model.pieces)
    number = rng.choice([-1, 0, 5, len(model.pieces), 2**31 - 1, -(2**31)])
    if what == "special id":
        name = rng.choice(["unk_id", "bos_id", "eos_id", "pad_id"])
        setattr(model.trainer_spec, name, number)
    elif what == "score":
        piece.score = rng.choice([float("nan"), float("inf"), -1e38, 0.0])
    elif what == "type":
        piece.type = rng.choice([1, 2, 3, 4, 5, 6])
    elif what == "piece":
        piece.piece = rng.choice(["", "a", "\u2581" * 5000, "<0x41>", model.pieces[5].piece, "\n"])
    elif what == "drop":
        del model.pieces[rng.randrange(len(model.pieces)) :]
    elif what == "swap":
        other = rng.choice(model.pieces)
        piece.piece, other.piece = other.piece, piece.piece
    elif what == "normalizer":
        model.normalizer_spec.precompiled_charsmap = rng.randbytes(rng.choice([1, 8, 1000]))
    else:
        model.trainer_spec.vocab_size = number
        model.trainer_spec.model_type = rng.choice([1, 2, 3, 4])
    return model.SerializeToString(), what


_PARTS: dict[str, list[Any]] = {
    "normalizer": [
        {"type": "NFKC"},
        {"type": "Lowercase"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"},
        {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
        {"type": "Replace", "pattern": {"Regex": "("}, "content": "x"},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Prepend", "prepend": "\u2581"},
        {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}]
            * 4,
        },
        {"type": "Strip", "strip_left": True, "strip_right": True},
    ],
    "pre_tokenizer": [
        None,
        {"type": "Whitespace"},
        {"type": "Split", "pattern": {"Regex": "\\s+"}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Removed", "invert": True},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False},
        {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": False},
        {"type": "Digits", "individual_digits": True},
        {"type": "Sequence", "pretokenizers": []},
    ],
    "decoder": [
        None,
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "WordPiece", "prefix": "", "cleanup": True},
    ],
    "model": [
        {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
        {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]], "byte_fallback": False},
        {"type": "BPE", "vocab": {}, "merges": []},
        {"type": "BPE", "vocab": {"a": 3_000_000_000}, "merges": []},
        {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"], ["a", "b"]]},
    ],
    "truncation": [
        {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    ],
    "padding": [
        {
            "strategy": {"Fixed": 64},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "a",
        }
    ],
}


def _mutate_tokenizer_json(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Adds a part, an id or an added token that a valid tokenizer.json could have."""
    tokenizer = json.loads(content)
    what = rng.choice([*_PARTS, "id", "added", "flag", "merge", "score"])
    model = tokenizer["model"]
    vocabulary = model["vocab"]
    if what in _PARTS:
        tokenizer[what] = rng.choice(_PARTS[what])
    elif what == "id":
        number = rng.choice([3 * 10**9, 2**32 - 1, 2**31, 10**6, -1, 0, 401])
        vocabulary[rng.choice(list(vocabulary))] = number
    elif what == "added":
        token = dict(rng.choice(tokenizer["added_tokens"]))
        flags = {key: rng.random() < 0.5 for key in ("special", "lstrip", "rstrip", "normalized")}
        number = rng.choice([len(vocabulary), 3, 10**6, 3 * 10**9])
        token |= {"id": number, "content": rng.choice(["<new>", "ba", "", " "]), **flags}
        tokenizer["added_tokens"].append(token)
    elif what == "flag":
        key = rng.choice(["byte_fallback", "fuse_unk", "ignore_merges", "dropout", "unk_token"])
        model[key] = rng.choice([True, False, 0.5, "a", "<|endoftext|>", None])
    elif what == "merge":
        merges = model["merges"]
        at = rng.randrange(len(merges))
        merges[at] = rng.choice([merges[0], ["a", "nothere"], "a b", ["a"], "a b c", []])
    else:
        model["continuing_subword_prefix"] = rng.choice(["##", "", None])
        model["end_of_word_suffix"] = rng.choice(["</w>", "", None])
    return json.dumps(tokenizer).encode(), f"part {what}"


def _encode(name: str) -> Callable[[], None]:
    def encode() -> None:
        """Loads a tokenizer and compares its ids with those of the library that defines them."""
        from megatron_chatflow.errors import UserError, run_main
        from megatron_chatflow.tokenizer import load_tokenizer

        def main() -> None:
            tokenizer = load_tokenizer(name)
            ids = tokenizer.encode_batch(TEXTS)
            alone = [tokenizer.encode(text) for text in TEXTS]
            if ids != alone:
                raise AssertionError("encode_batch differs from encode")
            for sequence in ids:
                if any(not 0 <= number < tokenizer.vocab_size for number in sequence):
                    raise AssertionError(f"ids outside of the {tokenizer.vocab_size}")
                tokenizer.decode(sequence)
            if len(tokenizer.num_bytes_per_id) != tokenizer.vocab_size:
                raise AssertionError("num_bytes_per_id has another length")
            expected = _reference_ids(name)
            if expected is not None and ids != expected:
                raise AssertionError("silently other ids than the library's")

        assert issubclass(UserError, ValueError)
        run_main(main)

    return encode


def _reference_ids(name: str) -> list[list[int]] | None:
    """Returns the library's ids of `TEXTS`, with None where added tokens may differ."""
    if name.endswith(".model"):
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=name)
        return [model.encode(text) for text in TEXTS]
    import tokenizers

    path = Path(name) / "tokenizer.json"
    if any(
        token["content"] in "".join(TEXTS)
        for token in json.loads(path.read_bytes())["added_tokens"]
    ):
        return None
    model = tokenizers.Tokenizer.from_file(str(path))
    model.no_truncation()
    model.no_padding()
    if hasattr(model.model, "dropout"):
        model.model.dropout = None
    return [model.encode(text, add_special_tokens=False).ids for text in TEXTS]


_DATASET = ("out_text_document.bin", "out_text_document.idx", "out_text_document.json")
_NEW_TOKENIZER = ("new/*",)
TOKENIZER = Kind(
    "tokenizer",
    _make_tokenizer,
    _damage_tokenizer,
    [
        Command("encode by tokenizer.model", _encode("tokenizer.model"), reads=["tokenizer.model"]),
        Command("encode by tokenizer.json", _encode("bpe"), reads=["bpe/*"]),
        Command(
            "preprocess by tokenizer.model",
            preprocess("--input", "text.jsonl", "--append-eod"),
            outputs=_DATASET,
            reads=["tokenizer.model"],
        ),
        Command(
            "preprocess by tokenizer.json",
            preprocess("--input", "text.jsonl", "--append-eod", "--append-bos", tokenizer="bpe"),
            outputs=_DATASET,
            reads=["bpe/*"],
        ),
        Command(
            "extend tokenizer.model",
            ("extend_vocab.py", "--tokenizer-model", "tokenizer.model", "--corpus", "text.jsonl",
             "--num-new", "3", "--min-count", "1", "--output-dir", "new"),
            outputs=_NEW_TOKENIZER,
            reads=["tokenizer.model"],
        ),
        Command(
            "extend tokenizer.json",
            ("extend_vocab.py", "--tokenizer-model", "bpe", "--corpus", "text.jsonl",
             "--num-new", "3", "--min-count", "1", "--output-dir", "new"),
            outputs=_NEW_TOKENIZER,
            reads=["bpe/*"],
        ),
    ],
)  # fmt: skip


# Text, pairs and chats


def _make_lines(folder: Path) -> None:
    copy_tokenizers(folder)
    write_lines(folder / "text.jsonl", [{"text": text, "id": k} for k, text in enumerate(TEXTS)])
    write_lines(folder / "chat.jsonl", CHATS)
    (folder / "chat.json").write_text(json.dumps(CHATS, indent=1))
    write_lines(folder / "pairs.jsonl", PAIRS)
    pairs = "".join(f"{pair['en']}\t{pair['zh']}\n" for pair in PAIRS)
    (folder / "pairs.tsv").write_text(pairs)
    (folder / "text.txt").write_text("\n".join(TEXTS))
    (folder / "gb.txt").write_bytes("\n".join(PAIRS[k]["zh"] for k in range(20)).encode("gb18030"))


_TEXT_TOKENS = [*JSON_TOKENS, "\t", "\t\t", '"', '""', "\ufffe", "\u2028", "\x85", "\x1c", "text"]
_LINES = ["text.jsonl", "chat.jsonl", "chat.json", "pairs.jsonl", "pairs.tsv", "text.txt", "gb.txt"]


def _damage_lines(folder: Path, rng: random.Random) -> Damage:
    path = folder / rng.choice(_LINES)
    way = rng.random()
    if way < 0.15:
        content, how = _line_bomb(rng)
    elif way < 0.5 and path.suffix == ".jsonl":
        lines = path.read_bytes().splitlines()
        at = rng.randrange(len(lines))
        lines[at], how = mutate_json(lines[at], rng)
        content = b"\n".join(lines) + b"\n"
    elif way < 0.6:
        content, how = mutate_text(path.read_bytes(), rng, _TEXT_TOKENS)
    else:
        content, how = mutate_bytes(path.read_bytes(), rng)
    path.write_bytes(content)
    return Damage(path.name, how)


def _line_bomb(rng: random.Random) -> tuple[bytes, str]:
    """Returns a file of a few megabytes that needs many times as much memory when parsed."""
    size = rng.choice([1, 4, 16]) << 20
    unit, begin, end = rng.choice(
        [
            (b"\n", b"", b""),
            (b"{}\n", b"", b""),
            (b"{}", b"", b""),
            (b"[],", b"[", b"[]]"),
            (b"[],", b'{"text":"a","x":[', b"[]]}"),
            (b'{"role":"user","content":""},', b'{"messages":[', b"{}]}"),
            (b"[", b'{"messages":', b"]"),
            (b'{"a":', b"", b"1"),
            (b"1,", b"[", b"1]"),
            (b'"",', b'{"en":[', b'""],"zh":[""]}'),
            (b"\t", b"", b"\n"),
            (b"\t\n", b"", b""),
            (b"a", b'{"text":"', b'"}'),
            (b"\\u0000", b'{"text":"', b'"}'),
            (b"9", b'{"text":', b"}"),
        ]
    )
    return begin + unit * (size // len(unit)) + end, f"bomb of {unit!r} x {size >> 20} MiB"


def _check_counts(folder: Path, damage: Damage) -> None:
    """Checks that every line is a document, blank, or counted as dropped."""
    from megatron_chatflow.data.sidecar import read_sidecar

    sidecar = read_sidecar(folder / "out_text_document")
    assert sidecar is not None
    # Blank lines are not records. Only JSON's white space makes a line blank.
    lines = (folder / "text.jsonl").read_bytes().split(b"\n")
    num_records = sum(bool(line.strip(b" \t\r")) for line in lines)
    num_known = sidecar["num_documents"] + sum(sidecar["dropped"].values())
    if num_records != num_known:
        raise AssertionError(
            f"{num_records} records, {num_known} are written or counted as dropped"
        )


_MESSAGES = tuple(
    f"out_messages_{part}" for part in ("document.*", "loss_mask.bin", "loss_mask.idx")
)
_PAIR_OUTPUTS = ("out_*_document.bin", "out_*_document.idx", "out_*_document.json")
_PAIR_MAY = ("out_*_loss_mask.*",)
LINES = Kind(
    "lines",
    _make_lines,
    _damage_lines,
    [
        Command(
            "text",
            preprocess("--input", "text.jsonl", "--append-eod", "--max-bad-lines", "1000"),
            outputs=_DATASET,
            reads=["text.jsonl"],
            check=_check_counts,
        ),
        Command(
            "text with duplicates dropped",
            preprocess("--input", "text.jsonl", "--dedup"),
            outputs=_DATASET,
            reads=["text.jsonl"],
        ),
        *(
            Command(
                f"chats of {name} by {template}",
                preprocess("--input", name, "--format", "chat", "--template", template),
                outputs=_MESSAGES,
                reads=[name],
            )
            for name in ("chat.jsonl", "chat.json")
            for template in ("chatflow", "chatml")
        ),
        *(
            Command(
                f"pairs of {name}, {level}",
                preprocess("--input", name, "--format", "pairs", "--pair-template", "translate",
                           *(("--pair-level", level) if level == "document" else ())),
                outputs=_PAIR_OUTPUTS,
                may_write=_PAIR_MAY,
                reads=[name],
            )
            for name, level in (
                ("pairs.jsonl", "sentence"), ("pairs.tsv", "sentence"), ("pairs.jsonl", "document")
            )
        ),
        *(
            Command(
                f"{name} by {how}",
                preprocess("--input", name, "--txt-documents", how, "--encoding", encoding),
                outputs=_DATASET,
                reads=[name],
            )
            for name, encoding in (("text.txt", "utf-8"), ("gb.txt", "gb18030"))
            for how in ("file", "line")
        ),
    ],
    needs=["tokenizer"],
)  # fmt: skip


# Compressed and columnar inputs


def _make_compressed(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet
    import zstandard

    copy_tokenizers(folder)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 40).encode()
    chats = "".join(json.dumps(chat) + "\n" for chat in CHATS).encode()
    for name, content in (("text.jsonl", lines), ("chat.jsonl", chats)):
        (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
        compressor = zstandard.ZstdCompressor(write_checksum=True, write_content_size=True)
        (folder / f"{name}.zst").write_bytes(compressor.compress(content))
    (folder / "lines.txt.gz").write_bytes(gzip.compress("\n".join(TEXTS).encode(), mtime=0))
    texts = pyarrow.array([text for text in TEXTS * 5])
    table = pyarrow.table({"text": texts, "n": pyarrow.array(range(len(texts)))})
    pyarrow.parquet.write_table(
        table, folder / "text.parquet", row_group_size=30, compression="zstd"
    )
    chats_table = pyarrow.Table.from_pylist([chat for chat in CHATS if "messages" in chat])
    pyarrow.parquet.write_table(chats_table, folder / "chat.parquet", compression="snappy")


def _damage_compressed(folder: Path, rng: random.Random) -> Damage:
    name = rng.choice(
        ["text.jsonl.gz", "text.jsonl.zst", "text.parquet", "chat.parquet", "chat.jsonl.gz",
         "chat.jsonl.zst", "lines.txt.gz"]
    )  # fmt: skip
    path = folder / name
    if rng.random() < 0.2:
        how = _write_bomb(path, rng)
    else:
        content, how = mutate_bytes(path.read_bytes(), rng)
        path.write_bytes(content)
    return Damage(name, how)


def _write_bomb(path: Path, rng: random.Random) -> str:
    """Writes a small file that expands to hundreds of megabytes or to very many records."""
    size = rng.choice([8, 32, 128]) << 20
    if path.suffix == ".parquet":
        return _write_parquet_bomb(path, rng)
    unit, begin, end = rng.choice(
        [
            (b"\n", b"", b""),
            (b"{}\n", b"", b""),
            (b"[],", b"[", b"[]]"),
            (b" ", b'{"text":"', b'"}\n'),
            (b"\0", b"", b""),
            (b'{"role":"user","content":"a"},', b'{"messages":[', b"{}]}"),
        ]
    )
    if unit == b"{}\n":  # each is a document where lines are documents
        size = min(size, 32 << 20)
    block = unit * ((1 << 20) // len(unit))
    output = io.BytesIO()
    if path.suffix == ".gz":
        stream: Any = gzip.GzipFile(fileobj=output, mode="wb", compresslevel=1, mtime=0)
    else:
        import zstandard

        stream = zstandard.ZstdCompressor(level=1).stream_writer(output, closefd=False)
    with stream:
        stream.write(begin)
        for _ in range(size >> 20):
            stream.write(block)
        stream.write(end)
    path.write_bytes(output.getvalue())
    return f"bomb of {unit!r} x {size >> 20} MiB"


def _write_parquet_bomb(path: Path, rng: random.Random) -> str:
    import pyarrow
    import pyarrow.parquet

    num_rows, size = rng.choice([(1000, 4 << 20), (100_000, 1 << 14), (3_000_000, 1)])
    key = "text" if path.name.startswith("text") else "messages"
    value: Any = "a" * size
    if key == "messages":
        value = [{"role": "user", "content": value}, {"role": "assistant", "content": "b"}]
        num_rows = min(num_rows, 200_000)
        table = pyarrow.table({key: pyarrow.array([value] * min(num_rows, 60))})
        size = 60 * size
    else:
        column = pyarrow.DictionaryArray.from_arrays(
            pyarrow.array([0], pyarrow.int8()).take(pyarrow.array([0] * num_rows)), [value]
        )
        table = pyarrow.table({key: column})
    # Above the limit of a dictionary page, every row would be written with its own value.
    pyarrow.parquet.write_table(
        *(table, path),
        compression="zstd",
        row_group_size=num_rows,
        dictionary_pagesize_limit=1 << 30,
    )
    return f"bomb of {num_rows} rows of {size} bytes"


def _is_checksummed(damage: Damage) -> bool:
    """Returns whether the file has a checksum of its text, as gz and zst do.

    Bombs are not damage.
    """
    return not damage.how.startswith("bomb") and damage.file.endswith((".gz", ".zst"))


COMPRESSED = Kind(
    "compressed",
    _make_compressed,
    _damage_compressed,
    [
        *(
            Command(
                f"text of {name}",
                preprocess("--input", name),
                outputs=_DATASET,
                compared=("*.bin", "*.idx"),
                is_covered=_is_checksummed,
                reads=[name],
            )
            for name in ("text.jsonl.gz", "text.jsonl.zst", "text.parquet")
        ),
        *(
            Command(
                f"chats of {name}",
                preprocess("--input", name, "--format", "chat"),
                outputs=_MESSAGES,
                compared=("*.bin", "*.idx"),
                is_covered=_is_checksummed,
                reads=[name],
            )
            for name in ("chat.jsonl.gz", "chat.jsonl.zst", "chat.parquet")
        ),
        *(
            Command(
                f"{how}s of lines.txt.gz",
                preprocess("--input", "lines.txt.gz", "--txt-documents", how),
                outputs=_DATASET,
                compared=("*.bin", "*.idx"),
                is_covered=_is_checksummed,
                reads=["lines.txt.gz"],
            )
            for how in ("file", "line")
        ),
    ],
    needs=["tokenizer"],
    limits=Limits(cpu_seconds=60, wall_seconds=240),
)


# Chat templates

_TEMPLATE = """{%- if messages[0]['role'] == 'system' -%}
{{ bos_token }}<<SYS>>{{ messages[0].content | trim }}<</SYS>>
{%- set loop_messages = messages[1:] -%}
{%- else -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- for message in loop_messages -%}
{%- if message['role'] == 'user' -%}[INST] {{ message.content }} [/INST]
{%- elif message['role'] == 'assistant' -%} {{ message.content }}{{ eos_token }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%} {%- endif -%}
"""
_BOMBS = [
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{{ 10**10**8 }}",
    "{{ 'a' * 3000000000 }}",
    "{{ ('a' * 100000000) | upper | length }}",
    "{{ lipsum(n=100000) }}",
    "{{ 'a'.center(3000000000) }}",
    "{{ '%3000000000d' % 1 }}",
    "{{ '{:3000000000}'.format('a') }}",
    "{{ ([0] * 1000000000) | length }}",
    "{{ 'x' | indent(2000000000) }}",
    "{{ 'a' | center(2000000000) }}",
    "{{ messages | tojson(indent=2000000000) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
    "{{ ns.s }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch planted') }}",
    "{{ self.__init__.__globals__ }}",
    "{% include 'tokenizer.model' %}",
    "{% import 'x' as y %}",
    "{{ raise_exception('a\nb' * 3000) }}",
    "{{ strftime_now('%Y') }}",
    "{{ messages.append({'role': 'user'}) }}",
    "{{ messages[0].update({'content': 'z'}) }}",
    "{{ undefined_name.x }}",
    "{{ 1 / 0 }}",
    "{{ messages[99999999999] }}",
    "{{ 'a' | replace('', 'b' * 1000) | replace('', 'b' * 1000) | replace('', 'c' * 1000) }}",
    "{{ (messages * 100000000) | length }}",
    "{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' | wordwrap(1) }}",
    "{{ '\\ud800'.encode('utf-16') if false else 'x' }}",
    "{% generation %}{{ 'x' }}{% endgeneration %}",
]
_TEMPLATE_TOKENS = [
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "{% endfor %}",
    "{% if %}",
    "|",
    "[",
    "]",
    "(",
    "'",
]
_TEMPLATE_TOKENS += ["{% for m in messages %}", "{{ m }}", "~", "**", "9" * 5000, "messages", ".x"]
_TEMPLATE_TOKENS += ["| tojson", "| trim", "{% break %}", "{{ loop.index }}", "\x00", "\n", *_BOMBS]


def _make_template(folder: Path) -> None:
    copy_tokenizers(folder)
    write_lines(folder / "chat.jsonl", CHATS[:12])
    (folder / "chat.jinja").write_text(_TEMPLATE)


def _damage_template(folder: Path, rng: random.Random) -> Damage:
    template = _TEMPLATE
    if rng.random() < 0.5:
        at = rng.choice([0, len(template), template.index("[INST]")])
        template = template[:at] + rng.choice(_BOMBS) + template[at:]
        how = "bomb"
    else:
        content, how = mutate_text(template.encode(), rng, _TEMPLATE_TOKENS)
        template = content.decode("utf-8", "surrogateescape")
    if rng.random() < 0.5:
        path = folder / "bpe" / "tokenizer_config.json"
        settings = json.loads(path.read_bytes())
        named = [{"name": "default", "template": template}, {"name": "rag", "template": "x"}]
        settings["chat_template"] = rng.choice([template, template, named])
        path.write_text(json.dumps(settings))
        return Damage("bpe/tokenizer_config.json", how)
    (folder / "chat.jinja").write_bytes(template.encode("utf-8", "surrogatepass"))
    return Damage("chat.jinja", how)


TEMPLATE = Kind(
    "template",
    _make_template,
    _damage_template,
    [
        *(
            Command(
                f"chats by {name} with loss on {loss}",
                preprocess("--input", "chat.jsonl", "--format", "chat", "--chat-template", name,
                           "--loss", loss, tokenizer=tokenizer),
                outputs=_MESSAGES[: 3 if loss == "response" else 1],
                may_write=_MESSAGES,
                reads=[name],
            )
            for name, tokenizer in (
                ("chat.jinja", "tokenizer.model"), ("bpe/tokenizer_config.json", "bpe")
            )
            for loss in ("response", "all")
        ),
    ],
    needs=["tokenizer"],
    limits=Limits(cpu_seconds=40, wall_seconds=240),
)  # fmt: skip


# YAML

_RUN: dict[str, Any] = {
    "model": {
        "num_layers": 2,
        "hidden_size": 16,
        "ffn_hidden_size": 24,
        "num_attention_heads": 2,
        "num_query_groups": 1,
        "max_position_embeddings": 64,
    },
    "tokenizer": {"tokenizer_model": "tokenizer.model"},
    "data": {
        "seq_length": 32,
        "holdout_every": 10,
        "sources": {
            "first": {"paths": ["corpus_text_document"]},
            "second": {
                "paths": ["corpus_text_document"],
                "packing": "best_fit",
                "boundaries": "isolate",
            },
        },
        "schedule": {
            "knots": [
                {"at": 0, "weights": {"first": 0.9, "second": 0.1}},
                {"at": 8, "weights": {"first": 0.2, "second": 0.8}, "ramp": "linear"},
            ]
        },
    },
    "optimizer": {"lr": 1e-3, "lr_warmup_iters": 1},
    "train": {"train_iters": 3, "micro_batch_size": 2, "global_batch_size": 4, "bf16": False},
}
_PAIR_TEMPLATES = {
    "templates": [
        {"prompt": "Put this into {target_language}: {source}\n", "response": "{target}"},
        {"text": "{source} = {target}"},
    ]
}
_YAML_TOKENS = [
    *"-:[]{}&*!|>%@`'\",#?",
    "\n",
    "  ",
    "\t",
    "---\n",
    "&a ",
    "*a",
    "<<: ",
    "!!binary ",
]
_YAML_TOKENS += [
    "!!python/object/apply:os.system ['touch planted']",
    "!!set ",
    "!!int ",
    ".nan",
    "~",
]
_YAML_TOKENS += [
    "1e999",
    "0x" + "f" * 4000,
    "9" * 5000,
    "2026-11-29",
    "[" * 2000,
    "yes",
    "\x00",
    "{a: " * 900,
]


def _make_yaml(folder: Path) -> None:
    copy_tokenizers(folder)
    records = [{"text": text} for text in made_up_sentences(200, seed=1)]
    write_lines(folder / "long.jsonl", records)
    write_lines(folder / "pairs.jsonl", PAIRS)
    (folder / "run.yaml").write_text(yaml.safe_dump(_RUN))
    (folder / "pairs.yaml").write_text(yaml.safe_dump(_PAIR_TEMPLATES))
    job = preprocess("--input", "long.jsonl", "--append-eod")
    Command("", (*job, "--output-prefix", "corpus")).call_to_end()


def _damage_yaml(folder: Path, rng: random.Random) -> Damage:
    name = rng.choice(["run.yaml", "run.yaml", "pairs.yaml"])
    path = folder / name
    value = _RUN if name == "run.yaml" else _PAIR_TEMPLATES
    way = rng.random()
    if way < 0.6:
        changed, how = mutate_object(value, rng)
        text = json.dumps(changed) if rng.random() < 0.5 else yaml.safe_dump(changed)
        content = text.encode("utf-8", "surrogatepass")
    elif way < 0.7:
        content, how = _aliases(rng), "aliases"
    elif way < 0.85:
        content, how = mutate_text(path.read_bytes(), rng, _YAML_TOKENS)
    else:
        content, how = mutate_bytes(path.read_bytes(), rng)
    path.write_bytes(content)
    return Damage(name, how)


def _aliases(rng: random.Random) -> bytes:
    """Returns YAML aliases that multiply what they refer to."""
    lines = ["model: {num_layers: 2}", "a0: &a0 " + rng.choice(["[x, x, x]", "{k: 1}", "x"])]
    for k in range(1, rng.choice([4, 12, 40])):
        names = ", ".join([f"*a{k - 1}"] * rng.choice([2, 9]))
        lines.append(
            f"a{k}: &a{k} " + rng.choice([f"[{names}]", f"{{<<: [{names}]}}", f"{{k: [{names}]}}"])
        )
    lines.append(rng.choice(["templates: *a1", "data: *a1", "optimizer: {lr: *a0}"]))
    return "\n".join(lines).encode()


_CACHES = ("*packing*", "*.cache*")
YAML = Kind(
    "yaml",
    _make_yaml,
    _damage_yaml,
    [
        Command(
            "dry run",
            ("megatron_chatflow.pretrain", "--config", "run.yaml", "--dry-run"),
            may_write=_CACHES,
            reads=["run.yaml"],
        ),
        Command(
            "plan of the blend",
            ("plan_blend.py", "--config", "run.yaml"),
            may_write=_CACHES,
            reads=["run.yaml"],
        ),
        Command(
            "pairs by templates",
            preprocess(*("--input", "pairs.jsonl", "--format", "pairs"),
                       *("--pair-template", "pairs.yaml")),
            outputs=("out_*_document.*",),
            may_write=_PAIR_MAY,
            reads=["pairs.yaml"],
        ),
    ],
    needs=["tokenizer"],
)  # fmt: skip

KINDS = [TOKENIZER, YAML, TEMPLATE, LINES, COMPRESSED]
