"""Tests the tokenizers of LLaMA 3 and Qwen on small models with their splits and special tokens.

The references are transformers and the tokenizers library.
"""

import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from family_tokenizers import QWEN_TEXT, make_folder

from megatron_chatflow.convert.vocabulary import grow_rows, vocabulary_growth
from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess import preprocess, settings_of_options
from megatron_chatflow.preprocess.encode import encode_segments
from megatron_chatflow.preprocess.templates import FAMILY_TEMPLATES
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer
from megatron_chatflow.tokenizer.chat_template import (
    Chat,
    ChatMessage,
    JinjaTemplate,
    chat_of_exchanges,
)
from megatron_chatflow.tokenizer.documents import Segment
from megatron_chatflow.tokenizer.extend import extend_tokenizer, whole_pieces

transformers = pytest.importorskip("transformers")

TEXTS = [
    *("Hello", "你好，世界", "  before", "after  ", "\ttab\t", "a\r\nb", "x\n\n\n y", "end\n"),
    *("1234567 3.14 ١٢٣", "é vs e\u0301", "ﬁ Å", "😀👨\u200d👩", "\u3000全角\u3000"),
    *("don't I'LL we'Ve", "c:\n    x = 1\n\n\ty", "</s><s>[INST] x [/INST]", "{{ x }} {% raw %}"),
    *("\u200b\u00a0\u2028", "\ufffd", "a" * 3000, "漢字" * 300, "ทดสอบ हिन्दी", ". 'S", "<|x|>"),
    *("<think>", "tool <tool_call>\n{}\n</tool_call>", "\u202eabc\u202c \ufeff"),
    *("\u0000\u0007", "\u1112\u1161\u11ab x\u0301\u0323"),
]
PIECES = ["\u4eba\u5de5", "机器学习", "𠀀", "ᜀᜁ", "wörld", "\u6c34"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("families")
    return {family: make_folder(folder / family, family) for family in ("llama3", "qwen")}


def theirs(tokenizer: Tokenizer) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tokenizer.model_path.parent)


def template_of(tokenizer: Tokenizer, name: str, **variables: Any) -> JinjaTemplate:
    names = tuple(sorted(tokenizer.special_tokens.items()))
    source = FAMILY_TEMPLATES[name]
    return JinjaTemplate(
        name, source, tokenizer.control_tokens, names, tuple(sorted(variables.items()))
    )


def awkward_chats() -> list[Chat]:
    chats = [chat_of_exchanges(None, ((f"q{text}", "answer"),)) for text in TEXTS]
    chats += [
        chat_of_exchanges("Be brief." if k % 2 else None, (("q", f"a{text}"),))
        for k, text in enumerate(TEXTS)
    ]
    chats += [chat_of_exchanges(" s ", [(f"q{k}", f"a{k}") for k in range(n)]) for n in (2, 5)]
    thought = "<think>\nhm\n</think>\n\n"
    chats.append(chat_of_exchanges(None, (("q", f"{thought}a"), ("r", f"{thought}b"))))
    chats.append(chat_of_exchanges(None, ((" q ", "a"), ("\n", f"{thought}b"))))
    empty = ChatMessage("system", "")
    chats.append(Chat((empty, ChatMessage("user", "q"), ChatMessage("assistant", " a", True))))
    chats.append(chat_of_exchanges("漢" * 500, (("12345", "1 22 333"),)))
    question = ChatMessage("user", "q")
    answers = [ChatMessage("assistant", "no"), ChatMessage("assistant", "yes", True)]
    chats.append(Chat((question, answers[0], question, answers[1])))
    return chats


def written_answers(chat: Chat, name: str) -> list[str]:
    """Returns the text with loss of every answer, as the family's own template writes it."""
    written = []
    for answer in chat.answers:
        text = answer.text
        if name.startswith("llama3"):
            text = text.strip() + "<|eot_id|>"
        else:
            thought = ""
            if name == "qwen3" and "</think>" in text:
                head, _, text = text.rpartition("</think>")
                thought, text = head.partition("<think>")[2].strip("\n"), text.lstrip("\n")
            if name == "qwen3" and answer is chat.answers[-1]:
                text = f"<think>\n{thought}\n</think>\n\n{text}"
            text = unicodedata.normalize("NFC", text) + "<|im_end|>"
        written.append(text)
    return [text for text, answer in zip(written, chat.answers, strict=True) if answer.loss]


def written_chat(chat: Chat, name: str) -> str:
    """Returns the whole text of a chat in the format of the family's chat models.

    It is written from the models' cards, without Jinja: LLaMA 3's headers and the dates of 3.1,
    the system texts of Qwen2 and Qwen2.5, and the reasoning of Qwen3's last answer.
    """
    messages = [(message.role, message.text) for message in chat.messages]
    has_system = messages[0][0] == "system"
    if name.startswith("llama3"):
        if name == "llama3.1":
            system = messages.pop(0)[1] if has_system else ""
            dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
            messages.insert(0, ("system", dates + system.strip()))
        texts = [text if "Cutting" in text else text.strip() for _, text in messages]
        parts = [
            f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"
            for (role, _), text in zip(messages, texts, strict=True)
        ]
        return "<|begin_of_text|>" + "".join(parts)
    if name.startswith("mistral"):
        system = messages.pop(0)[1] if has_system else ""
        questions = [k for k, (role, _) in enumerate(messages) if role == "user"]
        place = questions[0 if name == "mistral-v1" else -1]
        text = "<s>"
        for k, (role, content) in enumerate(messages):
            if role == "user":
                content = f"{system}\n\n{content}" if k == place and system else content
                text += f"[INST] {content}{' ' if name == 'mistral-v1' else ''}[/INST]"
            else:
                text += f" {content if name == 'mistral-v1' else content.rstrip(' ')}</s>"
        return text
    if name in ("qwen2", "qwen2.5") and not has_system:
        maker = "" if name == "qwen2" else "You are Qwen, created by Alibaba Cloud. "
        messages.insert(0, ("system", f"{maker}You are a helpful assistant."))
    if name == "qwen3":
        answers = iter(written_answers(replace_loss(chat), name))
        messages = [
            (role, next(answers).removesuffix("<|im_end|>") if role == "assistant" else text)
            for role, text in messages
        ]
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in messages)


def replace_loss(chat: Chat) -> Chat:
    """Returns the chat with loss on every answer."""
    messages = [
        ChatMessage(message.role, message.text, message.role == "assistant")
        for message in chat.messages
    ]
    return Chat(tuple(messages))


NAMES = {
    "llama3": "llama3",
    "llama3.1": "llama3",
    "qwen2": "qwen",
    "qwen2.5": "qwen",
    "qwen3": "qwen",
}


@pytest.mark.parametrize("name", NAMES)
def test_chats_have_the_ids_of_transformers(models: dict[str, Tokenizer], name: str) -> None:
    tokenizer = models[NAMES[name]]
    template = template_of(tokenizer, name)
    template.check()
    reference = theirs(tokenizer)
    chats = awkward_chats()
    assert len(chats) >= 60
    for chat in chats:
        ids, mask, _ = encode_segments(tokenizer, template.document(chat, "response").segments)
        messages = [{"role": m.role, "content": m.text} for m in chat.messages]
        assert ids == reference.apply_chat_template(
            messages, chat_template=template.source, return_dict=False
        )
        assert ids == reference(written_chat(chat, name), add_special_tokens=False)["input_ids"]
        runs: list[list[int]] = []
        for k, (token_id, loss) in enumerate(zip(ids, mask, strict=True)):
            if loss and not (k and mask[k - 1]):
                runs.append([])
            if loss:
                runs[-1].append(token_id)
        assert [reference.decode(run) for run in runs] == written_answers(chat, name)
        assert ids.count(tokenizer.bos_id) == (1 if name.startswith("llama3") else 0)
    assert template.turn_end() == ("<|eot_id|>" if NAMES[name] == "llama3" else "<|im_end|>")


@pytest.mark.parametrize("name", ["mistral-v1", "mistral-v3"])
def test_chats_of_mistral_have_the_ids_of_transformers(
    tiny_sentencepiece_model: Path, tmp_path: Path, name: str
) -> None:
    """The tokenizer of v3 has control tokens for [INST] and [/INST], and prepends a space once."""
    load_tokenizer(tiny_sentencepiece_model).save_pretrained(tmp_path)
    if name == "mistral-v3":
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        content["normalizer"] = None
        scheme = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"}
        content["pre_tokenizer"] = {**scheme, "split": False}
        size = len(content["model"]["vocab"])
        for k, token in enumerate(("[INST]", "[/INST]")):
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            added = {"id": size + k, "content": token, **flags, "special": True}
            content["added_tokens"].append(added)
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path, "HuggingFaceTokenizer")
    template, reference = template_of(tokenizer, name), theirs(tokenizer)
    template.check()
    # transformers reads control tokens in the texts of messages as such, and preprocessing as text.
    chats = [c for c in awkward_chats() if not any("<s>" in m.text for m in c.messages)]
    assert len(chats) >= 60
    for chat in chats:
        ids, _, _ = encode_segments(tokenizer, template.document(chat, "response").segments)
        messages = [{"role": m.role, "content": m.text} for m in chat.messages]
        expected = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        text = written_chat(chat, name)
        assert text == reference.apply_chat_template(
            messages, chat_template=template.source, tokenize=False
        )
        assert ids == expected.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", ["llama3.1", "qwen3"])
def test_control_tokens_in_texts_stay_text(models: dict[str, Tokenizer], name: str) -> None:
    tokenizer = models[NAMES[name]]
    control = {tokenizer.control_id(token) for token in tokenizer.control_tokens}
    counts = []
    for text in ("plain", "".join(tokenizer.control_tokens)):
        chat = chat_of_exchanges(text, ((text, text), (text, text)))
        document = template_of(tokenizer, name).document(chat, "response")
        ids, mask, _ = encode_segments(tokenizer, document.segments)
        pairs = zip(ids, mask, strict=True)
        counts.append([(token_id, loss) for token_id, loss in pairs if token_id in control])
    assert counts[0] == counts[1]


def test_thinking_turned_off_is_part_of_the_prompt(models: dict[str, Tokenizer]) -> None:
    template = template_of(models["qwen"], "qwen3", enable_thinking=False)
    document = template.document(chat_of_exchanges(None, (("q", "a"), ("r", "b"))), "response")
    assert [s.text for s in document.segments if s.loss] == ["a", "<|im_end|>", "b", "<|im_end|>"]
    assert "</think>\n\n" in "".join(s.text for s in document.segments)


def test_the_date_is_a_variable(models: dict[str, Tokenizer]) -> None:
    chat = chat_of_exchanges(None, (("q", "a"),))
    for variables, date in (({}, "26 Jul 2024"), ({"date_string": "1 Jan 2030"}, "1 Jan 2030")):
        template = template_of(models["llama3"], "llama3.1", **variables)
        text = "".join(s.text for s in template.document(chat, "all").segments)
        assert f"Today Date: {date}\n\n<|eot_id|>" in text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mistral-v1", "<s>[INST] S\n\nq [/INST] a </s>[INST] r [/INST] b</s>"),
        ("mistral-v3", "<s>[INST] q[/INST] a</s>[INST] S\n\nr[/INST] b</s>"),
    ],
)
def test_mistral(name: str, text: str) -> None:
    tokens = ("<s>", "</s>", *(("[INST]", "[/INST]") if name == "mistral-v3" else ()))
    special = (("bos_token", "<s>"), ("eos_token", "</s>"))
    template = JinjaTemplate(name, FAMILY_TEMPLATES[name], tokens, special)
    template.check()
    document = template.document(chat_of_exchanges("S", (("q", "a "), ("r", "b"))), "response")
    assert "".join(segment.text for segment in document.segments) == text
    learnt = "".join(segment.text for segment in document.segments if segment.loss)
    assert learnt.replace(" ", "") == "a</s>b</s>"


@pytest.mark.parametrize("family", ["llama3", "qwen"])
@pytest.mark.parametrize("addition", ["merges", "added-tokens"])
def test_extended_vocabularies_have_the_ids_of_transformers(
    models: dict[str, Tokenizer], family: str, addition: Any, tmp_path: Path
) -> None:
    old = models[family]
    pieces = [p for p in PIECES if addition == "merges" or len(p) == 1]
    new = extend_tokenizer(old, pieces, tmp_path / "new", addition)
    assert old.control_tokens == new.control_tokens
    assert all(old.control_id(name) == new.control_id(name) for name in old.control_tokens)
    assert all(new.encode(text) == old.encode(text) for text in QWEN_TEXT)
    first = [new.encode_continuation(piece) for piece in pieces]
    assert all(len(ids) == 1 and ids[0] >= old.vocab_size for ids in first)
    generator = random.Random(1)
    parts = [*TEXTS, *PIECES, *"\n 9aZ", "12", "'s"]
    texts = ["".join(generator.choices(parts, k=8)) for _ in range(200)]
    for tokenizer in (old, new):
        reference = theirs(tokenizer)
        flags = {"add_special_tokens": False}
        assert tokenizer.encode_batch(texts) == reference(texts, **flags)["input_ids"]
        assert reference("a")["input_ids"] == [
            *([old.bos_id] * (family == "llama3")),
            *new.encode("a"),
        ]
    composed = (unicodedata.normalize("NFC", t) if family == "qwen" else t for t in texts)
    assert [new.decode(ids) for ids in new.encode_batch(texts)] == list(composed)


@pytest.mark.parametrize("family", ["llama3", "qwen"])
def test_pieces_that_the_split_cuts_are_left_out(
    models: dict[str, Tokenizer], family: str, caplog: pytest.LogCaptureFixture
) -> None:
    pieces = ["999", "e\u0301", "ที่", "人工"]
    kept = whole_pieces(models[family], pieces)
    assert kept == (["999", "人工"] if family == "llama3" else ["人工"])
    assert "pieces are left out" in caplog.text
    with pytest.raises(UserError, match="--add-as added-tokens"):
        whole_pieces(models[family], ["ที่"])


def test_new_tokens_take_the_rows_behind_the_tokenizer(
    models: dict[str, Tokenizer], tmp_path: Path
) -> None:
    """Qwen's models have more rows than its tokenizer has tokens."""
    old = models["qwen"]
    new = extend_tokenizer(old, PIECES, tmp_path / "new", "merges")
    num_new = new.vocab_size - old.vocab_size
    rows = torch.randn(old.vocab_size + num_new + 7, 4)
    growth = vocabulary_growth(old, new, len(rows))
    grown = grow_rows(rows, growth, "mean", 0)
    assert grown.shape == rows.shape and growth.new_rows == (old.vocab_size, new.vocab_size)
    torch.testing.assert_close(grown[: old.vocab_size], rows[: old.vocab_size], rtol=0, atol=0)
    torch.testing.assert_close(grown[new.vocab_size :], rows[new.vocab_size :], rtol=0, atol=0)
    assert not torch.equal(grown[old.vocab_size], rows[old.vocab_size])


@pytest.mark.parametrize("is_json", [True, False])
def test_a_space_only_at_the_beginning_of_a_text(
    tiny_sentencepiece_model: Path, tmp_path: Path, is_json: bool
) -> None:
    """Mistral 7B v0.3 prepends no space after a control token."""
    load_tokenizer(tiny_sentencepiece_model).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["normalizer"] = None
    content["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "\u2581",
        "prepend_scheme": "first",
        "split": False,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    reference = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path, "HuggingFaceTokenizer" if is_json else "auto")
    assert tokenizer.tokenizer_type == ("HuggingFaceTokenizer" if is_json else "Llama2Tokenizer")
    for parts in (("<s>", "bana", "</s>", " sanka"), ("bana", "</s>", "bana"), ("<s>", "  x")):
        segments = [Segment(p, True, "control" if "s>" in p else "text") for p in parts]
        ids = encode_segments(tokenizer, segments)[0]
        assert ids == reference.encode("".join(parts), add_special_tokens=False).ids


def test_preprocessing_with_a_family_template(models: dict[str, Tokenizer], tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bana"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}))
    options = {
        "inputs": [str(tmp_path / "chats.jsonl")],
        "output_prefix": str(tmp_path / "out"),
        "tokenizer_model": str(models["qwen"].model_path.parent),
        "format": "chat",
        "template": "qwen3",
        "chat_template_kwargs": '{"enable_thinking": false}',
        "num_workers": 1,
    }
    preprocess(settings_of_options(options))
    sidecar = json.loads((tmp_path / "out_messages_document.json").read_text())
    template = sidecar["template"]
    assert template["name"] == "qwen3" and template["jinja"] == FAMILY_TEMPLATES["qwen3"]
    assert template["variables"] == {"enable_thinking": False}
    assert sidecar["num_loss_tokens"] == len(models["qwen"].encode("bana")) + 1
    assert not sidecar["settings"]["append_bos"]
    with pytest.raises(UserError, match="--append-bos: the tokenizer has no BOS"):
        preprocess(settings_of_options({**options, "append_bos": True, "overwrite": True}))
    with pytest.raises(UserError, match="the template chatflow has no variables"):
        settings_of_options({**options, "template": "chatflow"})
