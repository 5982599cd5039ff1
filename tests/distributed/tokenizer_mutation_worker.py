"""Opens and uses mutated tokenizers, each in a process with limits on memory and time.

``python tokenizer_mutation_worker.py FOLDER NAME SEED NUM_MUTATIONS`` mutates the file NAME of a
tokenizer's folder. Every mutation must either work or end in a short `UserError`. All others are
printed with the number that reproduces them.
"""

import contextlib
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.extend import extend_tokenizer
from megatron_chatflow.tokenizer.small_files import (
    read_tokenizer_files,
    replace_tokenizer,
    token_ids,
    with_bos,
    with_chat_template,
    with_stop_tokens,
)

MAX_BYTES = 2 << 30
MAX_SECONDS = 20
MAX_MESSAGE = 1000
TEXT = "bana kedo </s> \ufb01 \uff21\u4e00 \U0001f9ff" + "a" * 40 + "!"
HOSTILE: list[Any] = [
    *(None, True, -1, 0, 1, 2**31, 3_000_000_000, 2**32 - 1, 2**63, 10**400, 0.5, 1e308),
    *("", " ", "a", "</s>", "\ud800", "\x00", "x" * 5000, "(a|a)*$", "(", "[]", "////fw=="),
    *([], {}, [[]], [None], {"type": "Sequence"}, {"type": "Lowercase"}),
    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 3000},
    {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "a" * 100},
    {"type": "Precompiled", "precompiled_charsmap": "////fw=="},
    {"type": "Prepend", "prepend": "b" * 1000},
    {"type": "FixedLength", "length": 0},
    {"type": "Strip", "content": "a", "start": 10**18, "stop": 10**18},
    {"type": "Split", "pattern": {"Regex": "(a|a|aa)+$"}, "behavior": "Isolated", "invert": False},
    {"strategy": {"Fixed": 3_000_000_000}, "direction": "Right", "pad_to_multiple_of": None}
    | {"pad_id": 0, "pad_type_id": 0, "pad_token": "</s>"},
    {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 5},
]


def places(part: Any) -> list[tuple[Any, Any]]:
    """Returns every container and key of a JSON value, at most 20 keys of each container."""
    found = []
    keys: list[Any] = []
    if isinstance(part, dict):
        keys = list(part)[:20]
    elif isinstance(part, list):
        keys = list(range(len(part)))[:20]
    for key in keys:
        found.append((part, key))
        found += places(part[key])
    return found


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    content = json.loads(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        found = places(content)
        if not found:
            break
        container, key = rng.choice(found)
        old, new = container[key], copy.deepcopy(rng.choice(HOSTILE))
        kind = rng.randrange(7)
        if kind <= 2:
            container[key] = new
        elif kind == 3:
            del container[key]
        elif kind == 4:
            container[key] = [old, new] if rng.random() < 0.5 else {"type": "Sequence", "x": old}
        elif kind == 5:
            container[key] = copy.deepcopy(rng.choice([box[name] for box, name in found]))
        else:  # A chain in any of the four components.
            steps = [copy.deepcopy(rng.choice(HOSTILE[-10:])) for _ in range(rng.randint(1, 9))]
            for name in ("normalizers", "pretokenizers", "processors", "decoders"):
                if isinstance(container, dict) and name in str(old):
                    container[key] = {"type": "Sequence", name: steps}
    return json.dumps(content).encode()


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 2, 8])):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            del changed[at : at + rng.choice([1, 4, 100])]
        elif kind == 1:
            changed[at:at] = rng.randbytes(rng.choice([1, 4, 100]))
        elif kind == 2:
            changed[at : at + 1] = rng.randbytes(1)
        elif kind == 3:
            changed[at:at] = changed[: rng.choice([1, 10, 1000])]
        else:
            del changed[at:]
    return bytes(changed)


def mutate_model(data: bytes, rng: random.Random) -> bytes:
    """Returns a SentencePiece model with changed fields."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(data)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    piece = rng.choice(list(model.pieces))
    kind = rng.randrange(9)
    if kind == 0:
        name = rng.choice(["unk_id", "bos_id", "eos_id", "pad_id", "vocab_size"])
        setattr(trainer, name, rng.choice([-(2**31), -1, 0, 1, 2, 5, 10**6, 2**31 - 1]))
    elif kind == 1:
        name = rng.choice(["unk_piece", "bos_piece", "eos_piece", "pad_piece", "unk_surface"])
        setattr(trainer, name, rng.choice(["", "zzz", "<s>", "bana", "\x00"]))
    elif kind == 2:
        piece.score = rng.choice([float("nan"), float("inf"), float("-inf"), -3e38, 0.0])
    elif kind == 3:
        piece.type = rng.choice([1, 2, 3, 4, 5, 6])
    elif kind == 4:
        piece.piece = rng.choice(["", "<s>", "</s>", "bana", "\u2581", "\x00", "x" * 100_000])
    elif kind == 5:
        trainer.model_type = rng.choice([1, 2, 3, 4])
        trainer.byte_fallback = rng.random() < 0.5
    elif kind == 6:
        normalizer.precompiled_charsmap = rng.choice([b"", b"\xff" * 100, rng.randbytes(2000)])
        normalizer.remove_extra_whitespaces = rng.random() < 0.5
    elif kind == 7:
        del model.pieces[rng.randrange(len(model.pieces)) :]
    else:
        raw = piece.piece.encode()
        return model.SerializeToString().replace(raw, b"\xff" * len(raw), 1)
    changed: bytes = model.SerializeToString()
    return changed


def use(folder: Path, name: str) -> None:
    """Uses a tokenizer as training, preprocessing, extension and export do."""
    tokenizer = load_tokenizer(folder / name if name.endswith(".model") else folder)
    tokenizer.encode(TEXT)
    tokenizer.encode_continuation(TEXT)
    tokenizer.encode_arrays([TEXT, "", "\ud800"], tokenizer.eos_id)
    assert len(tokenizer.num_bytes_per_id) == tokenizer.vocab_size
    assert isinstance(tokenizer.control_tokens, tuple)
    assert isinstance(tokenizer.special_tokens, dict)
    assert isinstance(tokenizer.add_bos_token, bool)
    tokenizer.decode(tokenizer.encode(TEXT) + [tokenizer.eos_id])
    tokenizer.save_pretrained(folder / "saved", add_bos_token=True)
    extended = extend_tokenizer(tokenizer, ["\u4e02", "\u4e03"], folder / "extended")
    files = replace_tokenizer(read_tokenizer_files(tokenizer), extended)
    files = with_chat_template(files, "{{ messages[0]['content'] }}")
    ids = {"bos_token_id": 1, "eos_token_id": tokenizer.eos_id, "pad_token_id": 0}
    with_stop_tokens(with_bos(files, extended), ids, extended)
    token_ids(files, extended)


def run(original: Path, name: str, data: bytes) -> int:
    """Uses a tokenizer in its own process.

    Returns 0 if it works, 2 for a user error, and 3 for a finding.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(MAX_SECONDS)
    with tempfile.TemporaryDirectory(dir=original.parent) as made:
        folder = Path(made, "tokenizer")
        shutil.copytree(original, folder)
        (folder / name).write_bytes(data)
        try:
            use(folder, name)
        except UserError as error:
            if len(str(error)) > MAX_MESSAGE:
                print(f"a message of {len(str(error))} characters: {str(error)[:200]}")
                return 3
            return 2
        except BaseException:
            traceback.print_exc(limit=-4, file=sys.stdout)
            return 3
    return 0


def main() -> None:
    """Runs mutations, prints the findings, and then the count of each exit status."""
    original, name = Path(sys.argv[1]), sys.argv[2]
    seed, num_mutations = int(sys.argv[3]), int(sys.argv[4])
    first = int(sys.argv[5]) if len(sys.argv) > 5 else 0
    original_data = (original / name).read_bytes()
    counts: dict[int, int] = {}
    for number in range(first, first + num_mutations):
        rng = random.Random(f"{seed}-{number}")
        structured = mutate_model if name.endswith(".model") else mutate_json
        mutate = rng.choice([structured, structured, mutate_bytes])
        data = mutate(original_data, rng)
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            status = 3
            with contextlib.suppress(BaseException):
                if num_mutations > 1:  # Rust writes its panics there.
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                status = run(original, name, data)
            sys.stdout.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        counts[status] = counts.get(status, 0) + 1
        if status not in (0, 2):
            print(f"finding: {name} {seed} 1 {number}: status {status}")
    print(json.dumps(counts))


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # No threads, because a fork would lose them.
    main()
