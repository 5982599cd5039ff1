"""Tests that the base model's small files accompany the weights up to the export."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_run import VOCAB_SIZE, TinyRun
from tiny_shape import SHAPE_OF_TINY_RUN

from megatron_chatflow.checkpoint.files import CARRIED
from megatron_chatflow.convert.from_huggingface import import_huggingface
from megatron_chatflow.convert.resize import resize_checkpoint
from megatron_chatflow.convert.shape import huggingface_config
from megatron_chatflow.convert.template import TokenizerChoice
from megatron_chatflow.convert.to_huggingface import export_checkpoint
from megatron_chatflow.convert.vocabulary import Resize
from megatron_chatflow.convert.weight_map import huggingface_shapes
from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess import preprocess
from megatron_chatflow.preprocess.settings import settings_of_options
from megatron_chatflow.preprocess.templates import JINJA_TEMPLATES
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.chat_template import find_chat_template
from megatron_chatflow.tokenizer.extend import extend_tokenizer
from megatron_chatflow.tokenizer.small_files import write_small_files
from megatron_chatflow.training.inputs import carried_files, open_inputs

SHAPE = SHAPE_OF_TINY_RUN
BASE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TOOLS = "tools: " + BASE
MESSAGES = [{"role": "user", "content": "ab cd"}]
GENERATION = {
    "bos_token_id": 1,
    "do_sample": True,
    "eos_token_id": [2, 5],
    "pad_token_id": 0,
    "temperature": 0.6,
    "top_p": 0.9,
    "transformers_version": "4.41.0",
}
CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "padding_side": "left",
    "model_max_length": 2048,
    "legacy": False,
}
WHOLE = {
    "tokenizer_config.json": json.dumps(CONFIG, indent=1),
    # on one line, unlike the output of this package
    "generation_config.json": json.dumps(GENERATION),
    "special_tokens_map.json": '{"eos_token": "</s>"}',
    "LICENSE": "A made-up licence.\n",
    "README.md": "# A made-up model\n",
    "notes.unknown": "kept all the same",
}
NAMED = [{"name": "default", "template": BASE}, {"name": "tool_use", "template": TOOLS}]
KINDS: dict[str, dict[str, str]] = {
    "inside": {**WHOLE, "tokenizer_config.json": json.dumps({**CONFIG, "chat_template": BASE})},
    "named": {**WHOLE, "tokenizer_config.json": json.dumps({**CONFIG, "chat_template": NAMED})},
    "jinja": {**WHOLE, "chat_template.jinja": BASE},
    "folder": {
        **WHOLE,
        "chat_template.jinja": BASE,
        "additional_chat_templates/tool_use.jinja": TOOLS,
    },
    "without": WHOLE,
    "bare": {"LICENSE": "A made-up licence.\n"},
}

MakeBase = Callable[..., Path]


@pytest.fixture(scope="module")
def make_base(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> MakeBase:
    """Builds a model folder of a kind, with a SentencePiece model or a tokenizer.json."""
    root = tmp_path_factory.mktemp("bases")

    @cache
    def tokenizer_json() -> Path:
        from transformers import AutoTokenizer

        made, saved = (tmp_path_factory.mktemp(name) for name in ("made", "saved"))
        load_tokenizer(tiny_run.tokenizer_model).save_pretrained(made)
        AutoTokenizer.from_pretrained(made).save_pretrained(saved)
        return saved / "tokenizer.json"

    def make(kind: str, *, of_json: bool = False, **changes: Any) -> Path:
        folder = root / f"{kind}{of_json}{len(list(root.iterdir()))}"
        folder.mkdir()
        tensors = {name: torch.ones(size) for name, size in huggingface_shapes(SHAPE).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
        config = {**huggingface_config(SHAPE, torch.float32, ids), "a_key_of_its_own": [1, 2]}
        (folder / "config.json").write_text(json.dumps(config))
        files = {**KINDS[kind], **changes}
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        shutil.copy(tokenizer_json() if of_json else tiny_run.tokenizer_model, folder)
        (folder / "extra.py").write_text("raise SystemExit")
        (folder / ".hidden").write_text("hidden")
        return folder

    return make


def small(folder: Path) -> dict[str, bytes]:
    """Returns all files other than weights."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix not in (".safetensors", ".py", "")
    } | {name: (folder / name).read_bytes() for name in ("LICENSE",) if (folder / name).exists()}


def make_chats(prefix: Path, tokenizer: Path, **options: Any) -> str:
    lines = [
        {"messages": [*MESSAGES, {"role": "assistant", "content": f"ef gh {number}"}] * 3}
        for number in range(60)
    ]
    path = prefix.with_name(f"{prefix.name}.jsonl")
    path.write_text("\n".join(map(json.dumps, lines)))
    job = {"inputs": (str(path),), "output_prefix": str(prefix), "append_eod": True}
    given = {"tokenizer_model": str(tokenizer), "format": "chat", "num_workers": 1}
    preprocess(settings_of_options({**job, **given, **options}))
    return f"{prefix}_messages_document"


def pack(**prefixes: str) -> dict[str, Any]:
    """Returns the configuration changes that train on these datasets."""
    weights = dict.fromkeys(prefixes, 1 / len(prefixes))
    return {
        "data__sources": {name: {"paths": [prefix]} for name, prefix in prefixes.items()},
        "data__schedule__knots": [{"at": 0, "weights": weights}],
    }


def trained(config: Any, run: Path, output: Path, **choice: Any) -> Path:
    """Exports a run that has this configuration and the weights of `run`."""
    inputs = open_inputs(config)
    shutil.copytree(run, output.with_name(f"{output.name}_run"))
    checkpoint = output.with_name(f"{output.name}_run") / "iter_0000000"
    shutil.rmtree(checkpoint / CARRIED)
    write_small_files(checkpoint / CARRIED, carried_files(config, inputs))
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(
        json.dumps({**state, "tokenizer": inputs.state.tokenizer})
    )
    export_checkpoint(checkpoint, output, tokenizer=TokenizerChoice(**choice))
    return output


def rendered(folder: Path, **flags: Any) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True, **flags
    )


def stops_of(folder: Path) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(folder).eos_token_id


@pytest.mark.parametrize(
    ("kind", "of_json"), [*((kind, False) for kind in KINDS), ("inside", True), ("bare", True)]
)
def test_without_training_every_small_file_comes_back(
    kind: str, of_json: bool, make_base: MakeBase, tmp_path: Path
) -> None:
    base = make_base(kind, of_json=of_json)
    import_huggingface(base, tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    expected, found = small(base), small(tmp_path / "hf")
    if kind == "bare":  # an export always specifies the end token
        assert json.loads(found.pop("generation_config.json"))["eos_token_id"] == 2
    assert found == expected
    assert not list((tmp_path / "hf").glob("*.py"))
    # Again from the export, and without the folder that the tokenizer was read from.
    import_huggingface(tmp_path / "hf", tmp_path / "again")
    shutil.move(tmp_path / "hf", tmp_path / "moved")
    export_checkpoint(tmp_path / "again", tmp_path / "hf2")
    assert small(tmp_path / "hf2") == small(tmp_path / "moved")


def test_transformers_reads_what_the_base_says(make_base: MakeBase, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    base = make_base("folder")
    import_huggingface(base, tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "hf", base))
    for name in ("padding_side", "model_max_length", "pad_token", "chat_template"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours("ab cd")["input_ids"] == theirs("ab cd")["input_ids"]
    assert ours("ab cd")["input_ids"][0] == 1
    assert rendered(tmp_path / "hf") == rendered(base) == "[user] ab cd\n[assistant] "
    assert rendered(tmp_path / "hf", tools=[{}]).startswith("tools: ")
    generation = GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (generation.temperature, generation.top_p) == (0.6, 0.9)
    assert stops_of(tmp_path / "hf") == [2, 5]


def test_a_changed_model_keeps_the_rest_of_its_config(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base("without")
    import_huggingface(base, tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "hf", dtype="bf16")
    before, after = (
        json.loads((path / "config.json").read_text()) for path in (base, tmp_path / "hf")
    )
    assert after == {**before, "torch_dtype": "bfloat16"}


def test_stop_tokens_of_config_json(make_base: MakeBase, tmp_path: Path) -> None:
    """Some models list them only there."""
    base = make_base("without")
    (base / "generation_config.json").unlink()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, 7]}))
    import_huggingface(base, tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    assert stops_of(tmp_path / "hf") == [2, 7]
    assert (tmp_path / "hf" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_the_token_that_ends_a_turn_is_a_stop_token(make_base: MakeBase, tmp_path: Path) -> None:
    token = {"content": "<|im_end|>", "special": True}
    token |= dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    config = {**CONFIG, "added_tokens_decoder": {"590": token}, "chat_template": BASE}
    config["chat_template"] = JINJA_TEMPLATES["chatml"]
    base = make_base("without", **{"tokenizer_config.json": json.dumps(config)})
    import_huggingface(base, tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    assert stops_of(tmp_path / "hf") == [2, 5, 590]
    after = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert after == {**GENERATION, "eos_token_id": [2, 5, 590]}


@pytest.mark.parametrize(
    ("kind", "begin"),
    [
        *((kind, "load_hf") for kind in ("inside", "named", "jinja", "folder", "without")),
        *((kind, "pretrained_checkpoint") for kind in ("named", "folder")),
    ],
)
def test_trained_templates(
    kind: str, begin: str, make_base: MakeBase, make_config: Any, tmp_path: Path
) -> None:
    base = make_base(kind)
    import_huggingface(base, tmp_path / "run")
    start = {
        f"checkpoint__{begin}": str(base if begin == "load_hf" else tmp_path / "run"),
        "tokenizer__tokenizer_model": str(base / "tokenizer.model"),
    }
    expected = small(base)
    # Without chats the base's template is kept byte for byte.
    plain = trained(make_config(**start), tmp_path / "run", tmp_path / "plain")
    assert small(plain) == expected
    # Chats in the base's own template change nothing either.
    if kind != "without":
        chats = make_chats(tmp_path / "own", base, chat_template=str(base))
        config = make_config(**start, **pack(chats=chats))
        assert small(trained(config, tmp_path / "run", tmp_path / "own_hf")) == expected
    # Chats in another template replace it.
    chats = make_chats(tmp_path / "other", base, template="chatflow")
    config = make_config(**start, **pack(chats=chats))
    other = trained(config, tmp_path / "run", tmp_path / "other_hf")
    assert rendered(other) == "### Instruction:\nab cd\n\n### Response:\n"
    changed = {name for name, data in small(other).items() if expected.get(name) != data}
    inside = kind in ("inside", "named", "without")
    assert changed == {"tokenizer_config.json" if inside else "chat_template.jinja"}
    if kind in ("named", "folder"):  # the base's other templates are kept
        assert rendered(other, tools=[{}]).startswith("tools: ")
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(other).model_max_length == 2048
    # A template named by the user takes precedence over the one of the training data.
    named = trained(config, tmp_path / "run", tmp_path / "named", chat_template=str(other))
    assert find_chat_template(named) == find_chat_template(other)
    named = trained(config, tmp_path / "run", tmp_path / "named2", chat_template="llama2")
    assert rendered(named) == "[INST] ab cd [/INST]"


def test_different_templates_are_warned_of(
    make_base: MakeBase, make_config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = make_base("jinja")
    import_huggingface(base, tmp_path / "run")
    chats = {
        "a": make_chats(tmp_path / "a", base, template="chatflow"),
        "b": make_chats(tmp_path / "b", base, chat_template=str(base)),
    }
    start = {"checkpoint__load_hf": str(base), "tokenizer__tokenizer_model": str(base)}
    config = make_config(**start, **pack(**chats))
    hf = trained(config, tmp_path / "run", tmp_path / "hf")
    assert (
        "the chats of the run use different templates (chatflow in a; chat_template.jinja in "
        "b); exports use the template of b." in caplog.text
    )
    assert small(hf) == small(base)  # the base's own, if it is among them


def test_no_known_template_is_warned_of(
    make_base: MakeBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import_huggingface(make_base("without"), tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    assert "no chat template found" in caplog.text
    assert find_chat_template(tmp_path / "hf") is None


@pytest.mark.parametrize(
    ("way", "kind", "new", "of_json"),
    [  # all pairs of values
        ("import", "inside", "extended", False),
        ("import", "folder", "bare", True),
        ("resize", "inside", "bare", True),
        ("resize", "folder", "extended", False),
        ("train", "inside", "bare", False),
        ("train", "folder", "extended", True),
    ],
)
def test_grown_vocabularies_keep_what_the_base_says(
    way: str,
    kind: str,
    new: str,
    of_json: bool,
    make_base: MakeBase,
    make_config: Any,
    tmp_path: Path,
) -> None:
    from transformers import AutoTokenizer

    base = make_base(kind, of_json=of_json)
    extended = extend_tokenizer(load_tokenizer(base), ["龍", "馬"], tmp_path / "extended")
    if new == "bare":  # written by another program, without other files beside it
        name = extended.model_path.name
        (tmp_path / "alone").mkdir()
        shutil.copy(tmp_path / "extended" / name, tmp_path / "alone")
        extended = load_tokenizer(tmp_path / "alone" / name)
    resize = Resize(extended)
    if way == "import":
        import_huggingface(base, tmp_path / "grown", resize=resize)
    else:
        import_huggingface(base, tmp_path / "run")
        resize_checkpoint(tmp_path / "run", tmp_path / "grown", resize)
    if way == "train":
        config = make_config(
            checkpoint__load_hf=str(base),
            checkpoint__embedding_init="mean",
            tokenizer__tokenizer_model=str(extended.model_path),
            tokenizer__tokenizer_type=extended.tokenizer_type,
        )
        hf = trained(config, tmp_path / "grown", tmp_path / "hf")
    else:
        hf = tmp_path / "hf"
        export_checkpoint(tmp_path / "grown", hf)
    ours, theirs = AutoTokenizer.from_pretrained(hf), AutoTokenizer.from_pretrained(base)
    for name in ("padding_side", "model_max_length", "pad_token", "chat_template"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert len(ours) == len(theirs) + 2
    text = " ab 龍馬 cd"
    begin = theirs("")["input_ids"]
    assert begin == ([] if of_json else [1])
    assert ours(text)["input_ids"] == begin + extended.encode(text)
    assert rendered(hf, tools=[{}] if kind == "folder" else None) == rendered(
        base, tools=[{}] if kind == "folder" else None
    )
    expected = small(base)
    for name in ("generation_config.json", "LICENSE", "README.md", "notes.unknown"):
        assert (hf / name).read_bytes() == expected[name]
    before, after = (json.loads((path / "config.json").read_text()) for path in (base, hf))
    assert after == {**before, "vocab_size": VOCAB_SIZE + 2}
    assert load_tokenizer(hf).fingerprint == extended.fingerprint


def test_tokens_that_a_grown_vocabulary_replaces_are_named_no_more(
    make_base: MakeBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Covers a pad token after the SentencePiece pieces, where new pieces get their ids."""
    token = {"content": "<pad>", "special": True}
    token |= dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    config = {**CONFIG, "added_tokens_decoder": {str(VOCAB_SIZE): token}, "pad_token": "<pad>"}
    generation = {**GENERATION, "pad_token_id": VOCAB_SIZE}
    base = make_base(
        "without",
        **{
            "tokenizer_config.json": json.dumps(config),
            "generation_config.json": json.dumps(generation),
            "added_tokens.json": json.dumps({"<pad>": VOCAB_SIZE}),
        },
    )
    extended = extend_tokenizer(load_tokenizer(base), ["龍", "馬"], tmp_path / "extended")
    assert "has no <pad> of the old tokenizer" in caplog.text
    import_huggingface(base, tmp_path / "grown", resize=Resize(extended))
    export_checkpoint(tmp_path / "grown", tmp_path / "hf")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert len(tokenizer) == VOCAB_SIZE + 2 and tokenizer.pad_token is None
    after = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert after == {**GENERATION, "pad_token_id": None}


def test_checkpoints_of_earlier_versions_take_what_lies_beside_the_tokenizer(
    make_base: MakeBase, tmp_path: Path
) -> None:
    base = make_base("folder")
    import_huggingface(base, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "iter_0000000" / CARRIED)
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    assert rendered(tmp_path / "hf", tools=[{}]) == rendered(base, tools=[{}])
    assert stops_of(tmp_path / "hf") == [2, 5]
    expected, found = small(base), small(tmp_path / "hf")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"):
        assert found[name] == expected[name]


def test_no_tokenizer_leaves_the_rest(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base("folder")
    import_huggingface(base, tmp_path / "run")
    choice = TokenizerChoice(leave_out=True)
    export_checkpoint(tmp_path / "run", tmp_path / "hf", tokenizer=choice)
    assert sorted(small(tmp_path / "hf")) == sorted(
        ["LICENSE", "README.md", "config.json", "generation_config.json", "notes.unknown"]
    )


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_damaged_files_are_refused_before_any_training(
    name: str, make_base: MakeBase, tmp_path: Path
) -> None:
    base = make_base("jinja", **{name: "[1]"})
    with pytest.raises(UserError, match=f"{name}: is damaged .*; download the folder again"):
        import_huggingface(base, tmp_path / "run")
