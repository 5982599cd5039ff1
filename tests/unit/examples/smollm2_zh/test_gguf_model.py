"""Compares a tiny GGUF file written by the `gguf` package with its Hugging Face conversion."""

import json

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers, trainers

from examples.smollm2_zh.gguf_model import convert_gguf, gguf_name, unpermute
from examples.smollm2_zh.gguf_tokenizer import build_tokenizer
from megatron_chatflow.convert.shape import LlamaShape, shape_of_huggingface
from megatron_chatflow.convert.weight_map import huggingface_shapes
from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

CONTROLS = ("<|end|>", "<|im_start|>", "<|im_end|>")
TEXT = ["the kiln is hot", "the clay in the kiln 1234", "窑里的泥土很热", "it's the potter's wheel"]


def train_tokenizer():
    """Trains a byte-level BPE of 320 tokens that begins with the three control tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(CONTROLS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def shape(tied, vocab_size):
    return LlamaShape(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=vocab_size,
        max_position_embeddings=128,
        rotary_base=5000.0,
        norm_epsilon=1e-5,
        init_method_std=0.02,
        untie_embeddings_and_output_weights=not tied,
    )


def permute(weight, num_heads):
    """Reorders rows as llama.cpp does, from the halves of a head to adjacent pairs."""
    halves = weight.reshape(num_heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def fields_of(model, tokenizer):
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "llama.block_count": model.num_layers,
        "llama.embedding_length": model.hidden_size,
        "llama.feed_forward_length": model.ffn_hidden_size,
        "llama.attention.head_count": model.num_attention_heads,
        "llama.attention.head_count_kv": model.num_query_groups,
        "llama.attention.layer_norm_rms_epsilon": model.norm_epsilon,
        "llama.context_length": model.max_position_embeddings,
        "llama.rope.freq_base": model.rotary_base,
        "llama.rope.dimension_count": model.head_dim,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [token for token, _ in vocabulary],
        "tokenizer.ggml.token_type": [3 if token in CONTROLS else 1 for token, _ in vocabulary],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def write_gguf(path, fields, tensors, architecture="llama", kind="F32"):
    writer = gguf.GGUFWriter(str(path), architecture)
    for name, value in fields.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_string(name, value)
    for name, values in tensors.items():
        if kind == "F32" or values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            quantisation = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(
                name, gguf.quants.quantize(values, quantisation), raw_dtype=quantisation
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_weights(model):
    generator = np.random.default_rng(7)
    return {
        name: generator.normal(1.0 if "norm" in name else 0.0, 0.1, size).astype(np.float32)
        for name, size in huggingface_shapes(model).items()
    }


def gguf_tensors(model, weights):
    heads = {"q_proj": model.num_attention_heads, "k_proj": model.num_query_groups}
    tensors = {}
    for name, values in weights.items():
        part = name.split(".")[-2]
        tensors[gguf_name(name)] = permute(values, heads[part]) if part in heads else values
    return tensors


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture
def small(tokenizer, tmp_path):
    """Returns fields, tensors and path of a model with tied embeddings."""
    model = shape(True, tokenizer.get_vocab_size())
    return (
        fields_of(model, tokenizer),
        gguf_tensors(model, random_weights(model)),
        tmp_path / "m.gguf",
    )


@pytest.mark.parametrize("tied", [True, False])
def test_values_are_the_models_own(tokenizer, tmp_path, tied):
    model = shape(tied, tokenizer.get_vocab_size())
    weights = random_weights(model)
    path = tmp_path / "m.gguf"
    write_gguf(path, fields_of(model, tokenizer), gguf_tensors(model, weights))
    written = convert_gguf(path, tmp_path / "hf")
    assert shape_of_huggingface(written.folder) == model
    assert written.num_tensors == len(weights)
    loaded = transformers.LlamaForCausalLM.from_pretrained(written.folder).state_dict()
    for name, values in weights.items():
        assert torch.equal(loaded[name], torch.from_numpy(values)), name


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_quantised_tensors_come_back_as_their_blocks_say(small, tmp_path, kind):
    fields, tensors, path = small
    convert_gguf(write_gguf(path, fields, tensors, kind=kind), tmp_path / "hf")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    quantisation = gguf.GGMLQuantizationType[kind]
    for name, gguf_key, num_heads in (
        ("model.layers.1.self_attn.k_proj.weight", "blk.1.attn_k.weight", 2),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight", None),
    ):
        stored = gguf.quants.quantize(tensors[gguf_key], quantisation)
        expected = gguf.quants.dequantize(stored, quantisation)
        assert not np.array_equal(expected, tensors[gguf_key])
        if num_heads:
            expected = unpermute(expected, num_heads)
        np.testing.assert_array_equal(loaded[name].numpy(), expected)


def test_bf16_halves_the_file(small, tmp_path):
    fields, tensors, path = small
    write_gguf(path, fields, tensors)
    whole = convert_gguf(path, tmp_path / "fp32")
    half = convert_gguf(path, tmp_path / "bf16", dtype="bf16")
    assert half.num_bytes * 2 == whole.num_bytes
    assert json.loads((half.folder / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_tokenizer_is_the_files_own(small, tokenizer, tmp_path):
    fields, tensors, path = small
    fields["tokenizer.chat_template"] = "{{ messages[0]['content'] }}"
    convert_gguf(write_gguf(path, fields, tensors), tmp_path / "hf")
    ours = load_tokenizer(tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in [*TEXT, "unseen Wörter 90210\n\n  indented", "🏺"]:
        ids = tokenizer.encode(text).ids
        assert ours.encode(text) == ids
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids) == text
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.unk_id) == (1, 2, 2, 0)
    assert theirs("<|im_start|>hot").input_ids[0] == 1
    message = [{"role": "user", "content": "hot?"}]
    assert theirs.apply_chat_template(message, tokenize=False) == "hot?"


def test_file_without_a_template_gets_chatml(small, tmp_path):
    fields, tensors, path = small
    convert_gguf(write_gguf(path, fields, tensors), tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    message = [{"role": "user", "content": "hot?"}]
    text = theirs.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nhot?<|im_end|>\n<|im_start|>assistant\n")


def test_the_end_of_a_turn_is_a_stop_token(small, tmp_path):
    fields, tensors, path = small
    fields["tokenizer.ggml.eos_token_id"] = 0
    convert_gguf(write_gguf(path, fields, tensors), tmp_path / "hf")
    config = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert config.eos_token_id == [0, 2]  # the end token of the file, and <|im_end|>


def test_begin_token_is_put_first_where_the_file_says_so(small, tmp_path):
    fields, _, path = small
    assert build_tokenizer(path, fields).encode("hot").ids[0] != 1
    fields["tokenizer.ggml.add_bos_token"] = True
    assert build_tokenizer(path, fields).encode("hot").ids[0] == 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("llama.rope.scaling.type", "yarn", "scaled rotary"),
        ("llama.expert_count", 8, "experts"),
        ("llama.attention.head_count_kv", 3, "do not match the hidden size 64"),
        ("llama.feed_forward_length", 0, "feed_forward_length is 0"),
        ("llama.block_count", 3, r"no tensor blk\.2"),
        ("llama.block_count", 1, r"has a tensor blk\.1"),
        ("llama.feed_forward_length", 128, r"blk\.0\.ffn_gate\.weight has shape \[96, 64\]"),
        ("tokenizer.ggml.model", "llama", "only byte-level BPE"),
        ("tokenizer.ggml.pre", "qwen2", "pre-tokenizer 'qwen2'"),
        ("tokenizer.ggml.eos_token_id", 999, "outside the vocabulary"),
        ("tokenizer.ggml.merges", ["窑 窑"], "merges do not match"),
    ],
)
def test_what_cannot_be_converted_is_refused(small, tmp_path, field, value, message):
    fields, tensors, path = small
    fields[field] = value
    with pytest.raises(UserError, match=message) as caught:
        convert_gguf(write_gguf(path, fields, tensors), tmp_path / "hf")
    assert str(path) in str(caught.value)
    assert [child.name for child in tmp_path.iterdir()] == [path.name]


def test_other_architectures_and_damage_are_refused(small, tmp_path):
    fields, tensors, path = small
    with pytest.raises(UserError, match="architecture 'gemma'"):
        convert_gguf(write_gguf(path, {}, tensors, architecture="gemma"), tmp_path / "hf")
    with pytest.raises(UserError, match="file not found"):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "hf")
    content = write_gguf(path, fields, tensors).read_bytes()
    for damaged in (b"", b"GGUF", b"not a model" * 9, content[:3000], content[:-5000]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged or not a GGUF"):
            convert_gguf(path, tmp_path / "hf")
