"""Tests loss spans of chats and pairs: exact at token boundaries, with the ids of transformers."""

import json
from pathlib import Path

import pytest
import tokenizers
from preprocess_jobs import Jobs
from prompts import prompt_segments

from megatron_chatflow.preprocess.encode import encode_segments
from megatron_chatflow.preprocess.pairs import PairSettings
from megatron_chatflow.preprocess.settings import CorpusSettings
from megatron_chatflow.preprocess.templates import (
    JINJA_TEMPLATES,
    TEMPLATES,
    document_of_chat,
)
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer
from megatron_chatflow.tokenizer.chat_template import chat_of_exchanges
from megatron_chatflow.tokenizer.documents import Segment

ANSWERS = ["kedo  luno\n", "\u4e00\u4e25\u3002", "<s>bana</s>", "\U0001f9ff 12", "Sanka."]


@pytest.fixture
def jobs(tmp_path: Path, tiny_sentencepiece_model: Path) -> Jobs:
    return Jobs(tmp_path, tiny_sentencepiece_model)


@pytest.fixture
def chatml_tokenizer(tmp_path: Path) -> Tokenizer:
    """Creates a byte-level tokenizer with chatml's marks as control tokens, like SmolLM2's."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator(["user assistant system bana kedo luno " * 20], trainer)
    model.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(tmp_path)


def learnt_spans(ids: list[int], mask: list[int]) -> list[list[int]]:
    """Returns the runs of ids that have a loss."""
    spans: list[list[int]] = []
    for position, (token_id, loss) in enumerate(zip(ids, mask, strict=True)):
        if loss and (position == 0 or not mask[position - 1]):
            spans.append([])
        if loss:
            spans[-1].append(token_id)
    return spans


def messages_of(answers: list[str]) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": "Sanka."}]
    for number, answer in enumerate(answers):
        messages.append({"role": "user", "content": f"bana {number}?"})
        messages.append({"role": "assistant", "content": answer})
    return messages


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_span_decodes_to_its_answer(jobs: Jobs, template: str) -> None:
    chats = [ANSWERS, ANSWERS[::-1], ANSWERS[:1]]
    path = jobs.lines("a.jsonl", [{"messages": messages_of(answers)} for answers in chats])
    corpus = CorpusSettings(format="chat", json_keys=("messages",), template=template)
    content = jobs.run(path, corpus=corpus, append_eod=True)
    tokenizer = load_tokenizer(jobs.model)
    documents, masks = jobs.documents("messages"), jobs.masks("messages")
    assert content["num_loss_tokens"] == sum(map(sum, masks))
    for answers, ids, mask in zip(chats, documents, masks, strict=True):
        spans = learnt_spans(ids, mask)
        assert [span[-1] for span in spans] == [tokenizer.eos_id] * len(answers)
        assert all(tokenizer.eos_id not in span[:-1] for span in spans)
        mark = "<|im_end|>" if template == "chatml" else ""
        for span, answer in zip(spans, answers, strict=True):
            decoded = tokenizer.decode(span[:-1])
            expected = answer + mark if template == "chatml" else answer.strip()
            assert decoded.strip(" ") == expected
        prompts = tokenizer.decode([i for i, loss in zip(ids, mask, strict=True) if not loss])
        assert all(f"bana {number}?" in prompts for number in range(len(answers)))
        assert ids[-1] == tokenizer.eos_id != ids[-2]  # --append-eod adds no EOD after an answer


def test_loss_on_all(jobs: Jobs) -> None:
    path = jobs.lines("a.jsonl", [{"messages": messages_of(ANSWERS)}])
    corpus = CorpusSettings(format="chat", json_keys=("messages",), loss="all")
    jobs.run(path, corpus=corpus)
    (mask,) = jobs.masks("messages")
    assert set(mask) == {1}


@pytest.mark.parametrize("template", TEMPLATES)
def test_transformers_gives_the_same_ids(jobs: Jobs, template: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(jobs.model)
    tokenizer.save_pretrained(jobs.folder / "hf", JINJA_TEMPLATES[template])
    theirs = transformers.AutoTokenizer.from_pretrained(jobs.folder / "hf")
    _compare_with_transformers(theirs, tokenizer, template)


def test_transformers_gives_the_same_ids_with_control_tokens(
    tmp_path: Path, chatml_tokenizer: Tokenizer
) -> None:
    transformers = pytest.importorskip("transformers")
    chatml_tokenizer.save_pretrained(tmp_path / "hf", JINJA_TEMPLATES["chatml"])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    _compare_with_transformers(theirs, chatml_tokenizer, "chatml")
    ids, _, _ = encode_segments(
        chatml_tokenizer, prompt_segments(messages_of(ANSWERS)[:2], "chatml")
    )
    assert ids.count(0) == 3 and ids.count(1) == 2


def _compare_with_transformers(theirs: object, tokenizer: Tokenizer, template: str) -> None:
    clean = [answer for answer in ANSWERS if "<s>" not in answer]
    for num_messages in (2, 4, 6):
        for first in (0, 1):  # with and without the system turn
            messages = messages_of(clean)[first:num_messages]
            if messages[-1]["role"] != "user":
                continue
            ids, _, _ = encode_segments(tokenizer, prompt_segments(messages, template))
            rendered = theirs.apply_chat_template(  # type: ignore[attr-defined]
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
            assert rendered == ids


def test_over_long_chats_are_cut_between_turns_or_dropped(jobs: Jobs) -> None:
    answers = ["bana kedo luno", "sanka", "rasen"]
    path = jobs.lines(
        "a.jsonl",
        [{"messages": messages_of(answers)}, {"messages": messages_of(["bana " * 200])}],
    )
    corpus = CorpusSettings(format="chat", json_keys=("messages",))
    jobs.run(path, corpus=corpus)
    whole = jobs.documents("messages")[0]
    ends = [k + 1 for k, token_id in enumerate(whole) if token_id == 2]
    assert len(ends) == 3
    for limit, length in [(len(whole), ends[2]), (ends[2] - 1, ends[1]), (ends[1], ends[1])]:
        content = jobs.run(path, corpus=corpus, max_tokens=limit, append_eod=True)
        assert jobs.documents("messages") == [whole[:length]]
        assert [len(mask) for mask in jobs.masks("messages")] == [length]
        assert content["repaired"] == ({} if length == len(whole) else {"truncated": 1})
        assert content["dropped"] == {"too_long": 1}
    content = jobs.run(path, corpus=corpus, max_tokens=len(whole), over_long="drop")
    assert content["num_documents"] == 1
    assert content["num_text_bytes"] > 0


def test_pairs_with_translation_instruction(jobs: Jobs) -> None:
    path = jobs.folder / "pairs.tsv"
    path.write_text("bana kedo\t\u4e00\u4e25\nluno\tluno\nno tab\n", encoding="utf-8")
    settings = PairSettings(template="translate", direction="both")
    corpus = CorpusSettings(format="pairs", pairs=settings)
    content = jobs.run(str(path), corpus=corpus, max_dropped_share=0.7)
    assert content["dropped"] == {"identical_sides": 1, "no_tab": 1}
    tokenizer = load_tokenizer(jobs.model)
    spans = [
        learnt_spans(ids, mask) for ids, mask in zip(jobs.documents(), jobs.masks(), strict=True)
    ]
    texts = [[tokenizer.decode(span).strip(" ") for span in spans_of] for spans_of in spans]
    assert texts == [["\u4e00\u4e25"], ["bana kedo"]]
    corpus = CorpusSettings(format="pairs")
    jobs.run(str(path), corpus=corpus, append_eod=True, max_dropped_share=0.7)
    (ids,), (mask,) = jobs.documents(), jobs.masks()
    assert (ids[-1], set(mask)) == (2, {1})


def test_segments_of_one_kind_are_encoded_as_one(tiny_sentencepiece_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_sentencepiece_model)
    parts = [Segment("ba", False), Segment("na", False), Segment(" kedo", True)]
    ids, mask, ends = encode_segments(tokenizer, parts)
    assert ids == tokenizer.encode("bana") + tokenizer.encode_continuation(" kedo")
    assert mask == [0] * ends[1] + [1] * (ends[2] - ends[1])
    assert ends[0] == ends[1] == len(tokenizer.encode("bana"))
    assert encode_segments(tokenizer, []) == ([], [], [])


def test_a_turn_that_ended_with_the_end_token_gets_no_second(chatml_tokenizer: Tokenizer) -> None:
    chat = chat_of_exchanges(None, (("bana", "kedo"), ("luno", "bana")))
    document = document_of_chat(chat, "chatml", "response")
    ids, mask, ends = encode_segments(chatml_tokenizer, document.segments)
    assert ids.count(chatml_tokenizer.eos_id) == 4
    assert ids[-1] == chatml_tokenizer.eos_id != ids[-2]
    assert [ends[cut - 1] for cut in document.cut_points][-1] == len(ids) == len(mask)
    assert sum(mask) == len(chatml_tokenizer.encode("kedo") + chatml_tokenizer.encode("bana")) + 2


def test_a_chat_whose_learnt_answers_are_cut_off_is_dropped(jobs: Jobs) -> None:
    turns = [
        {"role": "user", "content": "bana"},
        {"role": "assistant", "content": "kedo", "weight": 0},
        {"role": "user", "content": "luno " * 40},
        {"role": "assistant", "content": "rasen"},
    ]
    path = jobs.lines("a.jsonl", [{"messages": turns}, {"messages": turns[2:]}])
    corpus = CorpusSettings(format="chat", json_keys=("messages",))
    content = jobs.run(path, corpus=corpus)
    assert (content["num_documents"], content["dropped"]) == (2, {})
    (first, second) = jobs.masks("messages")
    assert sum(first) == sum(second) == content["num_loss_tokens"] / 2
    content = jobs.run(
        path,
        jobs.lines("b.jsonl", [{"instruction": "bana", "output": "kedo"}]),
        corpus=corpus,
        max_tokens=len(jobs.documents("messages")[1]) - 1,
        max_dropped_share=0.7,
    )
    assert content["dropped"] == {"no_loss_tokens": 1, "too_long": 1}
