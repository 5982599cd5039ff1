"""Tests that chats use the model's own chat template, or the one that is requested."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from megatron_chatflow.convert.from_huggingface import import_huggingface
from megatron_chatflow.convert.huggingface_folder import huggingface_folder
from megatron_chatflow.convert.template import TokenizerChoice, trained_chat_template
from megatron_chatflow.errors import UserError
from megatron_chatflow.evaluation.evaluate import EvaluationSettings, evaluate, format_results
from megatron_chatflow.evaluation.models import LanguageModel
from megatron_chatflow.evaluation.tasks import TaskSettings, evaluate_tasks
from megatron_chatflow.evaluation.text import TextSource, evaluate_text
from megatron_chatflow.generation.generate import Generator
from megatron_chatflow.preprocess import preprocess, settings_of_options
from megatron_chatflow.preprocess.templates import JINJA_TEMPLATES
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.chat_template import (
    JinjaTemplate,
    chat_of_exchanges,
    with_default_variables,
)
from megatron_chatflow.tokenizer.extend import extend_tokenizer

OWN = (
    "{% for message in messages %}{% if message.role == 'user' %}[Q]{{ message.content }}[A]"
    "{% elif message.role == 'assistant' %}{{ message.content + eos_token }}{% endif %}{% endfor %}"
)
MESSAGES = [{"role": "user", "content": "bana"}, {"role": "assistant", "content": "kifu 今"}]


@pytest.fixture
def chats(tmp_path: Path) -> TextSource:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    return TextSource.parse(f"c:chat={path}")


def with_template(random_llama: Path, folder: Path, source: str | None, *, in_file: bool) -> Path:
    shutil.copytree(random_llama, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    if source is not None and in_file:
        (folder / "chat_template.jinja").write_text(source)
    elif source is not None:
        config["chat_template"] = source
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def loss_by_hand(model: LanguageModel, prompt: str, answer: str) -> float:
    """Computes the loss of the answer and the end token after it."""
    tokenizer = model.tokenizer
    begin = tokenizer.encode(prompt)
    learnt = [*tokenizer.encode_continuation(answer), tokenizer.eos_id]
    return -float(model.log_probs([begin + learnt])[0][len(begin) - 1 :].mean())


@pytest.mark.parametrize("in_file", [False, True])
def test_the_template_of_the_folder_is_the_default(
    random_llama: Path, chats: TextSource, tmp_path: Path, in_file: bool
) -> None:
    folder = with_template(random_llama, tmp_path / "own", OWN, in_file=in_file)
    lines: list[str] = []
    result = evaluate(folder, EvaluationSettings(sources=(chats,)), None, lines.append)
    model = LanguageModel(folder)
    expected = loss_by_hand(model, "[Q]bana[A]", "kifu 今")
    assert result["sources"]["c"]["loss"] == pytest.approx(expected, rel=1e-5)
    name = "chat_template.jinja" if in_file else "tokenizer_config.json"
    assert lines == [f"{folder}: texts start with nothing; chat template: {name} (the model's own)"]
    assert result["chat_template"]["name"] == name
    import_huggingface(folder, tmp_path / "run")
    checkpoint = evaluate(tmp_path / "run", EvaluationSettings(sources=(chats,)))
    assert checkpoint["sources"] == result["sources"]


def test_another_template_is_taken_when_asked_for(
    random_llama: Path, chats: TextSource, tmp_path: Path
) -> None:
    settings = EvaluationSettings(sources=(chats,))
    folder = with_template(random_llama, tmp_path / "m", JINJA_TEMPLATES["llama2"], in_file=True)
    (tmp_path / "own.jinja").write_text(OWN)
    model = LanguageModel(folder)
    lines: list[str] = []

    def loss(asked: str | None, path: Path = folder) -> float:
        choice = TokenizerChoice(chat_template=asked)
        result = evaluate(path, settings, choice, lines.append)
        return result["sources"]["c"]["loss"]

    llama2 = loss_by_hand(model, "[INST] bana [/INST]", " kifu 今 ")
    own = loss_by_hand(model, "[Q]bana[A]", "kifu 今")
    assert loss(None) == pytest.approx(llama2, rel=1e-5)
    assert lines[-1].endswith("chat template: llama2 (the model's own)")
    for asked in (str(tmp_path / "own.jinja"), "chatflow", str(folder)):
        for path in (folder, with_template(random_llama, tmp_path / "none", None, in_file=True)):
            found = loss(asked, path)
            assert lines[-1].endswith(f"chat template: {asked} (from --chat-template)")
            if asked.endswith(".jinja"):
                assert found == pytest.approx(own, rel=1e-5)
            elif asked == str(folder):
                assert found == pytest.approx(llama2, rel=1e-5)
        shutil.rmtree(tmp_path / "none")
    none = with_template(random_llama, tmp_path / "none", None, in_file=True)
    assert loss(None, none) == loss("chatflow", folder)
    assert "chatflow (the model has none)" in "".join(lines)
    with pytest.raises(UserError, match="no chat template: nowhere: use one of chatflow"):
        loss("nowhere")
    assert (folder / "chat_template.jinja").read_text() == JINJA_TEMPLATES["llama2"]


THINKING = OWN.replace("[A]", "[A]{% if not enable_thinking %}[X]{% endif %}")


def test_variables_are_set_for_every_use_of_the_template(
    random_llama: Path, chats: TextSource, tmp_path: Path
) -> None:
    folder = with_template(random_llama, tmp_path / "m", THINKING, in_file=True)
    model = LanguageModel(folder)
    for value, prompt in ((True, "[Q]bana[A]"), (False, "[Q]bana[A][X]")):
        variables = (("enable_thinking", value),)
        settings = EvaluationSettings(sources=(chats,), template_variables=variables)
        found = evaluate(folder, settings)["sources"]["c"]["loss"]
        assert found == pytest.approx(loss_by_hand(model, prompt, "kifu 今"), rel=1e-5)
        theirs = LanguageModel(folder, variables=variables).hf_tokenizer
        assert theirs.apply_chat_template(MESSAGES[:1], tokenize=False) == prompt
    none = with_template(random_llama, tmp_path / "none", None, in_file=True)
    with pytest.raises(UserError, match="has no chat template, and variables of one are given"):
        LanguageModel(none, variables=variables)


def test_an_export_sets_the_variables_of_its_data(random_llama: Path, tmp_path: Path) -> None:
    values = {"enable_thinking": True, "a": 'x"\\\n今🙂%}', "b": -1.5, "c": None, "not a name": 1}
    data, jinja = tmp_path / "chat.jsonl", "\n{{ a }}{{ b }}{{ c }}" + THINKING
    data.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    (tmp_path / "t.jinja").write_text(jinja)
    sources = {}
    for name, kwargs in (("plain", "{}"), ("set", json.dumps(values))):
        options = {
            "inputs": [str(data)],
            "output_prefix": str(tmp_path / name),
            "tokenizer_model": str(random_llama),
            "format": "chat",
            "chat_template": str(tmp_path / "t.jinja"),
            "chat_template_kwargs": kwargs,
            "num_workers": 1,
        }
        preprocess(settings_of_options(options))
        sources[name] = trained_chat_template({"c": [f"{tmp_path / name}_messages_document"]}, None)
    assert sources["plain"] == jinja
    source = sources["set"]
    assert source is not None and with_default_variables(source, values) == source
    folder = with_template(random_llama, tmp_path / "m", source, in_file=True)
    text = '\nx"\\\n今🙂%}-1.5None[Q]bana[A]'
    theirs = LanguageModel(folder).hf_tokenizer
    assert theirs.apply_chat_template(MESSAGES[:1], tokenize=False) == text
    thinking = theirs.apply_chat_template(MESSAGES[:1], tokenize=False, enable_thinking=False)
    assert thinking == text.replace("[A]", "[A][X]")  # a caller's value counts
    chat = chat_of_exchanges(None, (("bana", "kifu"),))
    plain = JinjaTemplate("t", jinja, (), (("eos_token", "</s>"),), tuple(values.items()))
    alone = JinjaTemplate("t", source, (), (("eos_token", "</s>"),))
    assert alone.document(chat, "all") == plain.document(chat, "all")


def test_what_a_template_refuses_is_counted(
    random_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strict = OWN.replace(
        "{% for message in messages %}",
        "{% for message in messages %}{% if 'luno' in message.content %}"
        "{{ raise_exception('no') }}{% endif %}",
    )
    model = LanguageModel(with_template(random_llama, tmp_path / "m", strict, in_file=True))
    refused = [{"role": "user", "content": "luno"}, MESSAGES[1]]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (MESSAGES, refused)))
    result = evaluate_text(model, TextSource.parse(f"c:chat={path}"))
    assert result.num_documents == 1 and result.num_dropped == {"template_refused": 1}
    assert "c: dropped records: 1 template_refused" in caplog.text
    path.write_text(json.dumps({"messages": refused}) + "\n")
    with pytest.raises(UserError, match=r"contains no documents .*\(dropped: 1 template_refused\)"):
        evaluate_text(model, TextSource.parse(f"c:chat={path}"))


def test_generation_takes_a_template_and_a_tokenizer_for_a_folder(
    random_llama: Path, tmp_path: Path
) -> None:
    folder = with_template(random_llama, tmp_path / "m", JINJA_TEMPLATES["llama2"], in_file=True)
    (tmp_path / "own.jinja").write_text(OWN)
    asked = [{"role": "user", "content": "bana"}]
    tokenizer = load_tokenizer(folder)
    prompts = {None: "[INST] bana [/INST]", "own": "[Q]bana[A]"}
    for name, prompt in prompts.items():
        choice = TokenizerChoice(chat_template=name and str(tmp_path / "own.jinja"))
        with huggingface_folder(folder, choice) as opened:
            assert Generator(opened).encode_chat(asked) == tokenizer.encode(prompt)
            assert (opened == folder) == (name is None)
    assert opened != folder and not opened.exists()

    # A tokenizer beside a folder that has none, or in place of the folder's own.
    for bare in (tmp_path / "bare", folder):
        if bare != folder:
            bare.mkdir()
            for kept in ("config.json", "generation_config.json", "model.safetensors"):
                shutil.copy(folder / kept, bare)
        with huggingface_folder(bare, TokenizerChoice(tokenizer.model_path)) as opened:
            assert Generator(opened).encode("bana") == tokenizer.encode("bana")
    larger = extend_tokenizer(tokenizer, ["龍"], tmp_path / "larger")
    with (
        pytest.raises(
            UserError, match="has 513 tokens, .* only 512 rows; give the run's tokenizer"
        ),
        huggingface_folder(folder, TokenizerChoice(larger.model_path)),
    ):
        pass


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is an extra")
def test_lm_eval_gets_the_template_when_asked(
    random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    records = [{"question": f"bana {k}", "answer": k % 3} for k in range(24)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    config = {
        "task": "local_chats",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "t.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["kifu", "luno 今", "sanka"],
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "local_chats.yaml").write_text(json.dumps(config))
    model = LanguageModel(with_template(random_llama, tmp_path / "m", OWN, in_file=True))
    tokenizer = model.tokenizer

    def accuracy(before: str, behind: str, space: str) -> float:
        num_right = 0
        for record in records:
            prompt = tokenizer.encode(f"{before}{record['question']}{behind}")
            answers = [
                tokenizer.encode_continuation(space + choice) for choice in config["doc_to_choice"]
            ]
            rows = model.log_probs([prompt + ids for ids in answers])
            scores = [row[len(prompt) - 1 :].sum() for row in rows]
            num_right += scores.index(max(scores)) == record["answer"]
        return num_right / len(records)

    for apply, expected in {
        True: accuracy("[Q]", "[A]", ""),
        False: accuracy("", "", " "),
    }.items():
        settings = TaskSettings(("local_chats",), include_path=tmp_path, apply_chat_template=apply)
        assert evaluate_tasks(model, settings)["local_chats"]["acc"] == expected
    none = LanguageModel(with_template(random_llama, tmp_path / "none", None, in_file=True))
    with pytest.raises(UserError, match="--apply-chat-template: .* has no chat template"):
        evaluate_tasks(none, TaskSettings(("x",), apply_chat_template=True))


def test_no_change_per_token_across_vocabularies(random_llama: Path, tmp_path: Path) -> None:
    """Figures per token of two vocabularies are shown side by side, without a difference."""
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"text": "bana 龍龍 kifu"}) + "\n")
    settings = EvaluationSettings(sources=(TextSource.parse(f"s={path}"),))
    base = evaluate(random_llama, settings)
    other = extend_tokenizer(load_tokenizer(random_llama), ["龍"], tmp_path / "larger")
    larger = {**base, "tokenizer": {"sha256": other.fingerprint, "vocab_size": other.vocab_size}}

    def changes(first: dict, second: dict) -> dict[str, str]:
        rows = [line.split() for line in format_results([first, second]).splitlines()[1:]]
        return {row[1]: row[-1] for row in rows}

    assert changes(base, larger) == {"bits_per_byte": "+0.0%", "loss": "-", "perplexity": "-"}
    assert set(changes(base, base).values()) == {"+0.0%"}
    # The same vocabulary in another file gives the same tokens.
    copied = {**base, "tokenizer": {**base["tokenizer"], "sha256": "another"}}
    assert set(changes(base, copied).values()) == {"+0.0%"}
