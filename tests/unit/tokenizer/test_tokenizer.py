"""Tests that tokenizers give the libraries' ids and that raw text never becomes a control id."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer import load_tokenizer

HARD_TEXTS = [
    "",
    " ",
    "  two  and   three   ",
    "<s>a</s><unk><pad>[INST] b [/INST]",
    "a\x00b\x00",
    "\u2581already\u2581 escaped \u2581",
    "tab\tand\r\nnewlines\n\n\n",
    "emoji \U0001f9ff\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "private \ue000 unassigned \U000e0fff noncharacter \uffff",
    "<0x41><0x0A>",
    "combining e\u0301 and bidi \u202eabc\u202c \ufeff",
    "x" * 3000,
    "\u4e00\u4e25" * 500,
]


def adversarial_texts(num_texts: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    parts = [*HARD_TEXTS[1:-2], "ban", "ken. ", "\u4e00", " ", "  ", "</s>", "1234"]
    return ["".join(generator.choices(parts, k=generator.randint(1, 20))) for _ in range(num_texts)]


@pytest.fixture(scope="module")
def exported(tiny_sentencepiece_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    load_tokenizer(tiny_sentencepiece_model).save_pretrained(folder, "{{ messages[0]['content'] }}")
    return folder


def byte_level_model(folder: Path) -> Path:
    """Creates a byte-level BPE `tokenizer.json` like GPT-2's, with control and special tokens."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator(["bana kedo bana luno keda " * 50], trainer)
    model.enable_truncation(8)
    model.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_ids_are_sentencepieces(tiny_sentencepiece_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_sentencepiece_model, "Llama2Tokenizer")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tiny_sentencepiece_model))
    texts = HARD_TEXTS + adversarial_texts(200, seed=1)
    expected = [reference.encode(text) for text in texts]
    assert [tokenizer.encode(text) for text in texts] == expected
    assert tokenizer.encode_batch(texts) == expected
    assert not {0, 1, 2} & {token_id for ids in expected for token_id in ids}


def test_facts_of_a_llama_model(tiny_sentencepiece_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_sentencepiece_model)
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, 2)
    assert tokenizer.vocab_size == 512
    assert len(tokenizer.fingerprint) == 64


def test_a_folder_with_a_model_is_a_model(exported: Path) -> None:
    assert load_tokenizer(exported).tokenizer_type == "Llama2Tokenizer"
    assert load_tokenizer(exported, "HuggingFaceTokenizer").model_path.name == "tokenizer.json"


@pytest.mark.parametrize("tokenizer_type", ["Llama2Tokenizer", "HuggingFaceTokenizer"])
def test_text_comes_back(exported: Path, tokenizer_type: str) -> None:
    tokenizer = load_tokenizer(exported, tokenizer_type)
    for text in HARD_TEXTS + adversarial_texts(50, seed=2):
        if "\u2581" not in text:  # the model's space mark decodes to a space
            assert tokenizer.decode(tokenizer.encode(text)) == text
            ids = tokenizer.encode("\n") + tokenizer.encode_continuation(text)
            assert tokenizer.decode(ids) == "\n" + text


@pytest.mark.parametrize("tokenizer_type", ["Llama2Tokenizer", "HuggingFaceTokenizer"])
def test_num_bytes_per_id_adds_up(exported: Path, tokenizer_type: str) -> None:
    tokenizer = load_tokenizer(exported, tokenizer_type)
    assert tokenizer.num_bytes_per_id[[0, 1, 2]].tolist() == [0, 0, 0]
    for text in HARD_TEXTS:
        if text and "\u2581" not in text:
            ids = tokenizer.encode_continuation(text)
            assert tokenizer.num_bytes_per_id[ids].sum() == len(text.encode())


def test_surrogates_become_replacement_characters(exported: Path) -> None:
    for tokenizer_type in ("Llama2Tokenizer", "HuggingFaceTokenizer"):
        tokenizer = load_tokenizer(exported, tokenizer_type)
        assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")
        assert tokenizer.encode("\ud83e\uddff") == tokenizer.encode("\U0001f9ff")


def test_transformers_gives_the_same_ids(exported: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(exported)
    for with_config in (False, True):
        if with_config:  # as beside exported weights
            (exported / "config.json").write_text('{"model_type": "llama"}')
        theirs = transformers.AutoTokenizer.from_pretrained(exported)
        assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
        texts = HARD_TEXTS + adversarial_texts(100, seed=3)
        for text in texts:
            ids = theirs(text, split_special_tokens=True)["input_ids"]
            assert ids == tokenizer.encode(text)
        message = [{"role": "user", "content": "bana"}]
        assert theirs.apply_chat_template(message, tokenize=False) == "bana"


def test_byte_level_ids_are_those_of_the_library(tmp_path: Path) -> None:
    path = byte_level_model(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.tokenizer_type == "HuggingFaceTokenizer"
    reference = tokenizers.Tokenizer.from_file(str(path))
    reference.no_truncation()
    reference.encode_special_tokens = True
    texts = HARD_TEXTS + adversarial_texts(200, seed=4) + ["<|endoftext|> and <|im_start|>"]
    expected = [reference.encode(text, add_special_tokens=False).ids for text in texts]
    assert tokenizer.encode_batch(texts) == expected
    assert not {0, 1} & {token_id for ids in expected for token_id in ids}
    assert tokenizer.encode_continuation("bana") == tokenizer.encode("bana")
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer.num_bytes_per_id[ids].sum() == len(text.encode())
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 0, -1)


def test_configuration_beside_names_the_control_tokens(tmp_path: Path) -> None:
    byte_level_model(tmp_path)
    token = {"__type": "AddedToken", "content": "<|im_start|>", "special": True}
    config = {"eos_token": token, "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (-1, 1, 1)
    transformers = pytest.importorskip("transformers")
    tokenizer.save_pretrained(tmp_path / "copy")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert theirs("bana luno")["input_ids"] == tokenizer.encode("bana luno")


@pytest.mark.parametrize("content", ["{", "[1]", "null", "[" * 100_000])
def test_refuses_what_is_no_configuration(tmp_path: Path, content: str) -> None:
    byte_level_model(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match="not a tokenizer configuration: .*tokenizer_config.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("tokenizer_type", ["auto", "Llama2Tokenizer", "HuggingFaceTokenizer"])
@pytest.mark.parametrize("content", [b"", b"no model", b"{}", b"\x0a\x05\x0a\x01a", None])
def test_refuses_what_is_no_model(
    tmp_path: Path, tokenizer_type: str, content: bytes | None
) -> None:
    for name in ("tokenizer.model", "tokenizer.json"):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            load_tokenizer(tmp_path / name, tokenizer_type)


def test_refuses_an_unknown_type(tiny_sentencepiece_model: Path) -> None:
    with pytest.raises(UserError, match="GPT2BPETokenizer"):
        load_tokenizer(tiny_sentencepiece_model, "GPT2BPETokenizer")


def test_unigram_model_is_exported_as_the_model_alone(tmp_path: Path) -> None:
    generator = random.Random(0)
    lines = (" ".join(generator.choices(["bana", "kedo", "luno"], k=9)) for _ in range(200))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(tmp_path / "unigram"),
        vocab_size=290,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path / "unigram.model")
    tokenizer.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder" / "tokenizer.json").exists()
    copy = load_tokenizer(tmp_path / "folder")
    assert copy.fingerprint == tokenizer.fingerprint
    assert np.array_equal(copy.num_bytes_per_id, tokenizer.num_bytes_per_id)


def test_add_bos_token_is_read_where_each_kind_of_folder_says_it(
    tiny_sentencepiece_model: Path, byte_level_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    def folder(name: str, config: dict, *, with_json: bool, processor: bool = False) -> Path:
        load_tokenizer(tiny_sentencepiece_model).save_pretrained(
            tmp_path / name, add_bos_token=processor
        )
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config))
        if not with_json:
            (tmp_path / name / "tokenizer.json").unlink()
        return tmp_path / name

    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
    cases = {
        "said": ({**names, "add_bos_token": True}, False, False, True),
        "denied": ({**names, "add_bos_token": False}, True, True, False),
        "processor": (names, True, True, True),
        "no_processor": (names, True, False, False),
        "default_of_llama": (names, False, False, True),
        "other_class": ({**names, "tokenizer_class": "OtherTokenizer"}, False, False, False),
    }
    for name, (config, with_json, processor, expected) in cases.items():
        made = folder(name, config, with_json=with_json, processor=processor)
        assert load_tokenizer(made).add_bos_token is expected, name
        if with_json:
            assert load_tokenizer(made / "tokenizer.json").add_bos_token is expected, name
    assert not load_tokenizer(tiny_sentencepiece_model).add_bos_token  # no configuration at all
    assert not load_tokenizer(byte_level_model).add_bos_token

    for model, name in ((tiny_sentencepiece_model, "s"), (byte_level_model, "b")):
        tokenizer = load_tokenizer(model)
        tokenizer.save_pretrained(tmp_path / name, add_bos_token=True)
        for path in tmp_path / name, tmp_path / name / "tokenizer.json":
            copy = load_tokenizer(path)
            assert copy.add_bos_token
            assert copy.encode("bana kifu") == tokenizer.encode("bana kifu")  # the caller adds it
        theirs = AutoTokenizer.from_pretrained(tmp_path / name)
        expected = [tokenizer.bos_id, *tokenizer.encode("bana kifu")]
        assert theirs("bana kifu")["input_ids"] == expected
        # A copy of the copy keeps it and does not add a second one.
        load_tokenizer(tmp_path / name).save_pretrained(tmp_path / name / "again")
        theirs = AutoTokenizer.from_pretrained(tmp_path / name / "again")
        assert theirs("bana kifu")["input_ids"] == expected


def test_a_new_bos_leaves_an_old_post_processor_in_place(
    byte_level_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    content = json.loads(byte_level_model.read_bytes())
    end = {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"] = {
        "type": "Sequence",
        "processors": [
            {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": False,
                "use_regex": True,
            },
            {
                "type": "TemplateProcessing",
                "single": [text, end],
                "pair": [text, end, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {
                    "<|im_end|>": {"id": "<|im_end|>", "ids": [2], "tokens": ["<|im_end|>"]}
                },
            },
        ],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert not tokenizer.add_bos_token
    tokenizer.save_pretrained(tmp_path / "copy", add_bos_token=True)
    ids = AutoTokenizer.from_pretrained(tmp_path / "copy")("bana")["input_ids"]
    assert ids == [tokenizer.bos_id, *tokenizer.encode("bana"), 2]


def test_a_folder_without_the_file_of_a_type_is_refused_by_name(
    byte_level_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(byte_level_model.read_bytes())
    with pytest.raises(UserError, match=r"has tokenizer.json but no tokenizer.model: do not set"):
        load_tokenizer(tmp_path, "Llama2Tokenizer")
    (tmp_path / "empty").mkdir()
    for tokenizer_type in ("auto", "HuggingFaceTokenizer"):
        with pytest.raises(UserError, match="empty: has neither tokenizer"):
            load_tokenizer(tmp_path / "empty", tokenizer_type)
