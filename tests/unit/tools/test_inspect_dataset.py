"""Tests the commands inspect and merge, called in this process."""

import json
from pathlib import Path

import pytest
from preprocess_jobs import make_chats
from tool_calls import call_tool

from megatron_chatflow.preprocess import PreprocessSettings, preprocess
from megatron_chatflow.preprocess.inspect import Inspection
from megatron_chatflow.preprocess.settings import CorpusSettings
from megatron_chatflow.tokenizer import load_tokenizer


def run(tool: str, *arguments: object) -> tuple[int, str, str]:
    done = call_tool(tool, *arguments)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def chats(tmp_path: Path, tiny_sentencepiece_model: Path) -> Path:
    return make_chats(tmp_path, tiny_sentencepiece_model)


def test_shows_counts_and_decoded_spans(chats: Path, tiny_sentencepiece_model: Path) -> None:
    tokenizer = ("--tokenizer-model", tiny_sentencepiece_model)
    status, output, _ = run("inspect_dataset.py", chats, *tokenizer, "--num-samples", 1)
    assert status == 0
    assert "documents   3" in output
    assert "every offset, every id" in output
    assert "### Instruction:\nbana?\n\n### Response:\n<<kedo luno</s>>>" in output
    _, output, _ = run("inspect_dataset.py", chats, *tokenizer, "--color", "always")
    assert "\x1b[32mkedo luno\x1b[0m\x1b[32m\x1b[4m</s>\x1b[0m" in output


def test_control_tokens_are_shown(
    tmp_path: Path, tiny_sentencepiece_model: Path, byte_level_model: Path
) -> None:
    text = tmp_path / "a.jsonl"
    text.write_text('{"text": "bana </s> kedo"}\n')
    chat = tmp_path / "c.jsonl"
    turn = {"role": "user", "content": "bana"}, {"role": "assistant", "content": " kedo  luno"}
    chat.write_text(json.dumps({"messages": [*turn, *turn]}) + "\n")
    cases = {
        "text": (tiny_sentencepiece_model, CorpusSettings(), "<s>bana </s> kedo</s>"),
        "chatml": (
            byte_level_model,
            CorpusSettings(format="chat", json_keys=("messages",), template="chatml"),
            "<|im_start|>user\nbana<|im_end|>\n<|im_start|>assistant\n"
            "<< kedo  luno<|im_end|>>>\n<|im_start|>user\nbana<|im_end|>\n"
            "<|im_start|>assistant\n<< kedo  luno<|im_end|>>>",
        ),
        # The space before an answer belongs to it and is shown.
        "llama2": (
            tiny_sentencepiece_model,
            CorpusSettings(format="chat", json_keys=("messages",), template="llama2"),
            "[INST] bana [/INST]<< kedo  luno </s>>>[INST] bana [/INST]<< kedo  luno </s>>>",
        ),
    }
    for name, (model, corpus, expected) in cases.items():
        settings = PreprocessSettings(
            inputs=(str(text if corpus.format == "text" else chat),),
            output_prefix=str(tmp_path / name),
            tokenizer_model=str(model),
            corpus=corpus,
            append_bos=corpus.format == "text",
            append_eod=True,
        )
        preprocess(settings)
        inspection = Inspection(f"{tmp_path / name}_{corpus.json_keys[0]}_document")
        shown = inspection.sample(0, load_tokenizer(model), colored=False)
        assert shown.split("\n", 1)[1] == expected, name
    colored = Inspection(tmp_path / "text_text_document").sample(
        0, load_tokenizer(tiny_sentencepiece_model), colored=True
    )
    # In a terminal, the token is distinguished from text that looks like it.
    assert colored.endswith("\x1b[4m<s>\x1b[0mbana </s> kedo\x1b[4m</s>\x1b[0m")


def test_damage_and_mistakes(chats: Path, tmp_path: Path, tiny_sentencepiece_model: Path) -> None:
    data = bytearray(Path(f"{chats}.bin").read_bytes())
    data[10:12] = b"\xff\xff"
    Path(f"{chats}.bin").write_bytes(data)
    status, _, errors = run("inspect_dataset.py", chats)
    assert status == 2
    assert "error: id outside the vocabulary" in errors
    assert "65535 in sequence 0 at byte 10" in errors
    Path(f"{chats}.bin").write_bytes(data[:-2])
    status, _, errors = run("inspect_dataset.py", chats)
    assert status == 2 and "shorter than" in errors and "Traceback" not in errors
    status, _, errors = run("merge_datasets.py", "--input", tmp_path, "--output-prefix", chats)
    assert status == 2 and "output exists" in errors


def test_what_the_sidecar_tells_of_is_there(chats: Path) -> None:
    mask = chats.with_name("a_messages_loss_mask")
    masked = mask.with_suffix(".bin").read_bytes()
    mask.with_suffix(".bin").write_bytes(bytes([1]) + masked[1:])  # as valid a mask as the other
    status, _, error = run("inspect_dataset.py", chats)
    assert (status, error.count("\n")) == (2, 1)
    assert f"damaged dataset: {mask}.bin: does not match the hash" in error
    mask.with_suffix(".idx").unlink()
    status, _, error = run("inspect_dataset.py", chats)
    assert (status, error[: error.index(":", 8)]) == (2, "error: no loss mask")
    sidecar = chats.with_suffix(".json")
    sidecar.write_text(sidecar.read_text().replace('"vocab_size"', '"vocab_sise"'))
    status, _, error = run("inspect_dataset.py", chats)
    assert (status, error.count("\n")) == (2, 1)
    assert "damaged sidecar" in error and "tokenizer.vocab_size" in error
