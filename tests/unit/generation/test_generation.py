"""Tests generation with real, random models: streaming, seeds, stops, templates, the two tools."""

import inspect
import io
import json
import logging
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_chatflow.convert.huggingface_folder import huggingface_folder
from megatron_chatflow.errors import UserError
from megatron_chatflow.evaluation.models import LanguageModel
from megatron_chatflow.generation.generate import (
    Conversation,
    Generator,
    Sampling,
    TextStream,
    read_prompt,
    sample_token,
)
from megatron_chatflow.preprocess.templates import JINJA_TEMPLATES

GREEDY = Sampling(max_new_tokens=12, temperature=0)


@pytest.fixture
def folder(random_llama: Path) -> Path:
    return random_llama


@pytest.fixture(scope="module")
def generator(random_llama: Path) -> Generator:
    return Generator(random_llama)


def test_yarn_extends_the_longest_input(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "yarn"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    longest = config["max_position_embeddings"]
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": longest}
    config.pop("rope_parameters", None)
    (copy / "config.json").write_text(json.dumps({**config, "rope_scaling": rope}))
    assert Generator(copy).max_length == LanguageModel(copy).max_length == 4 * longest


def test_greedy_text_is_transformers_own(folder: Path, generator: Generator) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = generator.encode("the river")
    pieces: list[str] = []
    text = generator.stream(prompt, GREEDY, pieces.append)
    assert "".join(pieces) == text and len(pieces) > 1
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0].tolist()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the river" + text


@pytest.mark.parametrize("num_prompt", [7, 8, 9, 16, 25])  # around, twice and thrice the window
def test_a_sliding_window_bounds_the_cache(
    folder: Path, num_prompt: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token is the most likely one after a forward pass over the whole text, uncached."""
    shutil.copytree(folder, tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = {**json.loads(path.read_text()), "model_type": "mistral", "sliding_window": 8}
    path.write_text(json.dumps({**config, "architectures": ["MistralForCausalLM"]}))
    generator = Generator(tmp_path / "hf")
    prompt = torch.randint(259, 300, (num_prompt,), generator=torch.Generator().manual_seed(1))
    model, lengths, logits = generator._model, [], []
    forward = type(model).forward

    def record(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        output = forward(self, *args, **kwargs)
        cache = output["cache" if "cache" in output else "past_key_values"]
        lengths.append(max(layer.keys.shape[-2] for layer in cache.layers))
        logits.append(output.logits[0, -1])
        return output

    record.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(model), "forward", record)
    generator.stream(prompt.tolist(), replace(GREEDY, max_new_tokens=20), lambda piece: None)
    assert len(lengths) > 8 and max(lengths) < 8
    monkeypatch.undo()
    text = prompt.tolist()
    for found in logits:
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        text.append(int(expected.argmax()))


def test_transformers_warns_of_nothing(
    generator: Generator, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import logging as transformers_logging

    # Its own logger shows errors only and passes nothing on. Some messages come once per process.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    transformers_logging.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING, "transformers"), warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert generator.stream(generator.encode("the river"), GREEDY, lambda piece: None)
    assert not [record for record in caplog.records if "deprecated" in record.getMessage()]


def test_seed_decides(generator: Generator) -> None:
    prompt = generator.encode("the bridge")

    def sample(seed: int) -> str:
        sampling = Sampling(max_new_tokens=16, temperature=1.0, top_p=1.0, seed=seed)
        return generator.stream(prompt, sampling, lambda piece: None)

    assert sample(3) == sample(3)
    assert len({sample(seed) for seed in range(5)}) > 1


def test_nucleus_and_temperature() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()

    def drawn(temperature: float, top_p: float) -> set[int]:
        generator = torch.Generator().manual_seed(0)
        sampling = Sampling(temperature=temperature, top_p=top_p)
        return {sample_token(logits, sampling, generator) for _ in range(300)}

    assert drawn(1.0, 1.0) == {0, 1, 2, 3}
    assert drawn(1.0, 0.75) == {0, 1}
    assert drawn(1.0, 0.01) == {0}
    assert drawn(0.0, 1.0) == {0}
    assert drawn(0.05, 1.0) == {0}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(temperature: float, value: float) -> None:
    logits = torch.tensor([0.0, value, 1.0])
    with pytest.raises(UserError, match="logits that are not finite"):
        sample_token(logits, Sampling(temperature=temperature), torch.Generator())


def test_an_end_token_ends_the_text(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = generator.encode("the river")
    whole = list(generator._ids(prompt, 12, GREEDY, torch.Generator()))
    monkeypatch.setattr(generator._model.generation_config, "eos_token_id", [whole[3]])
    assert list(generator._ids(prompt, 12, GREEDY, torch.Generator())) == whole[:3]


def test_stop_texts_are_cut_off(generator: Generator) -> None:
    prompt = generator.encode("the river")
    whole = generator.stream(prompt, GREEDY, lambda piece: None)
    stop = whole[5:8]
    pieces: list[str] = []
    sampling = Sampling(max_new_tokens=12, temperature=0, stop=(stop,))
    assert generator.stream(prompt, sampling, pieces.append) == whole[: whole.find(stop)]
    assert "".join(pieces) == whole[: whole.find(stop)]


def test_stream_holds_back_what_may_change() -> None:
    raw = "a雨b###c".encode()
    shown: list[str] = []
    stream = TextStream(
        lambda ids: bytes(ids).decode("utf-8", "replace"), ["###", "never"], shown.append
    )
    for byte in raw:
        stream.put(byte)
    assert shown == ["a", "雨", "b"]
    assert stream.is_stopped and stream.end() == "a雨b"
    # Text held back as the possible beginning of a stop text is emitted at the end.
    stream = TextStream(lambda ids: bytes(ids).decode(), ["###"], shown.append)
    for byte in b"x##":
        stream.put(byte)
    assert stream.text == "x" and stream.end() == "x##"


def test_conversation_uses_the_template_and_forgets_what_does_not_fit(
    generator: Generator,
) -> None:
    conversation = Conversation(generator, GREEDY, system="the water")
    prompts: list[list[int]] = []
    answered = generator.stream

    class Recorder(Generator):
        def __init__(self) -> None:
            self.__dict__.update(generator.__dict__)

        def stream(self, prompt, sampling, write):
            prompts.append(list(prompt))
            return answered(prompt, sampling, write)

    conversation._generator = Recorder()
    assert conversation.answer("the river", lambda piece: None) == 0
    text = generator._tokenizer.decode(prompts[0])
    assert text == "the water\n\n### Instruction:\nthe river\n\n### Response:\n"
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    forgotten = [conversation.answer("the river", lambda piece: None) for _ in range(4)]
    assert max(forgotten) == 2
    assert all(len(ids) + GREEDY.max_new_tokens <= generator.max_length for ids in prompts)
    before = list(conversation.messages)
    with pytest.raises(UserError, match="prompt has .* tokens, but the context of the model is 96"):
        conversation.answer("the river " * 60, lambda piece: None)
    assert conversation.messages == before
    conversation.reset()
    assert conversation.messages == []


def test_templates_that_refuse(folder: Path) -> None:
    def conversation(template: str | None, system: str | None = None) -> Conversation:
        generator = Generator(folder)
        generator._tokenizer.chat_template = template
        return Conversation(generator, GREEDY, system)

    with pytest.raises(UserError, match="has no chat template"):
        conversation(None)
    unwilling = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}?"
    )
    conversation(unwilling)
    with pytest.raises(UserError, match=r"rejects this conversation \(no system\)"):
        conversation(unwilling, "the water")
    with pytest.raises(UserError, match="its chat template rejects this"):
        conversation("{% if %}")


def test_bad_input(generator: Generator, folder: Path, tmp_path: Path) -> None:
    for sampling, message in (
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"temperature": -1.0}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"top_p": 0.0}, "--top-p"),
    ):
        with pytest.raises(UserError, match=message):
            Sampling(**sampling)
    with pytest.raises(UserError, match="the prompt is empty"):
        generator.stream([], GREEDY, print)
    with pytest.raises(UserError, match="has 200 tokens, but the context of the model is 96"):
        generator.stream([5] * 200, GREEDY, print)
    with pytest.raises(UserError, match="folder not found"), huggingface_folder(tmp_path / "x"):
        pass
    with pytest.raises(UserError, match="contains no checkpoint"), huggingface_folder(tmp_path):
        pass
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match="transformers cannot load|has no model.safetensors"):
        Generator(tmp_path)


def test_folders_that_are_not_whole(folder: Path, tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            Generator(tmp_path)
        assert "\n" not in str(caught.value)

    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name, wrong in (("tokenizer.json", b"\xff{"), ("tokenizer_config.json", b"[1]")):
        (tmp_path / name).write_bytes(wrong)
        refused("transformers cannot load its tokenizer files")
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    lost = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    save_file(lost, path, metadata={"format": "pt"})
    refused("1 tensors are missing, the first is model.norm.weight")
    save_file({**tensors, "model.extra": torch.ones(2)}, path, metadata={"format": "pt"})
    refused("model.extra is not a tensor of the model")
    short = {**tensors, "model.norm.weight": torch.ones(7)}
    save_file(short, path, metadata={"format": "pt"})
    refused(r"model.norm.weight has shape \[7\], but \[32\] according to config.json")
    save_file(tensors, path, metadata={"format": "pt"})
    path.write_bytes(path.read_bytes()[:-100])
    refused("model.safetensors: is damaged at .* outside the file")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float99"}))
    refused("torch_dtype is 'float99'")


def test_prompts_that_are_not_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = io.TextIOWrapper(io.BytesIO("前".encode() + b"\xff"))
    monkeypatch.setattr(sys, "stdin", wrong)
    with pytest.raises(UserError, match="--prompt: is not valid UTF-8 at byte 3"):
        read_prompt("-")
    with pytest.raises(UserError, match="--prompt: is not valid UTF-8 at byte 1"):
        read_prompt("a\udcff")  # as Python represents an invalid byte of the command line
    assert read_prompt("雨 a") == "雨 a"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("雨\n".encode())))
    assert read_prompt("-") == "雨\n"


def test_chatml_turns_end_the_answer(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "tokenizer_config.json").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = JINJA_TEMPLATES["chatml"]
    config["additional_special_tokens"] = ["<|im_end|>"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    generator = Generator(tmp_path)
    end = generator._tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in generator._end_ids()
