"""The small files of a Hugging Face folder: tokenizer, chat templates, stop tokens, license.

Every file in a model's folder except the weights must be copied to the export. Otherwise the
exported model may not stop, may begin its texts differently, or may use a different chat template.
Conversion and training therefore copy these files unchanged, except for the following edits:

* `replace_tokenizer`: replaces the tokenizer, usually after the vocabulary has grown.
* `with_chat_template`: sets the chat template that the model was trained with.
* `with_bos`, `with_stop_tokens`: set how texts begin and how answers end.

The files are represented as a dictionary from names to contents. Names are relative to the folder,
with `/` as the separator.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from megatron_chatflow.config.fields import shorten
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import write_atomically
from megatron_chatflow.tokenizer.base import Tokenizer, configured_bos, sha256_of
from megatron_chatflow.tokenizer.chat_template import (
    CHAT_TEMPLATE_FILE,
    CHAT_TEMPLATE_FOLDER,
    JinjaTemplate,
    chat_template_names,
    chat_templates_in,
)
from megatron_chatflow.tokenizer.export import sentencepiece_files, with_special_tokens
from megatron_chatflow.tokenizer.tokenizer_json import (
    open_tokenizer_json,
    parse_json,
    parse_tokenizer_json,
)

logger = logging.getLogger(__name__)

SmallFiles = dict[str, bytes]

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
MODEL_CONFIG = "config.json"
_SPECIAL_TOKENS_MAP = "special_tokens_map.json"
_ADDED_TOKENS = "added_tokens.json"
_PROCESSOR_TEMPLATE = "chat_template.json"
_TEMPLATES = (CHAT_TEMPLATE_FILE, _PROCESSOR_TEMPLATE)
_MODEL_FILES = {"Llama2Tokenizer": "tokenizer.model", "HuggingFaceTokenizer": "tokenizer.json"}
# Files that belong to a vocabulary and are outdated when it changes.
_VOCABULARY = (*_MODEL_FILES.values(), "vocab.json", "merges.txt", _ADDED_TOKENS)
# Files that may accompany a tokenizer's file. Only these are read from a tokenizer's folder, which
# may contain unrelated files.
_BESIDE_TOKENIZER = (TOKENIZER_CONFIG, _SPECIAL_TOKENS_MAP, _ADDED_TOKENS, GENERATION_CONFIG)
_JSON_OBJECTS = (*_BESIDE_TOKENIZER, MODEL_CONFIG)

_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"),
    *(".index.json", ".distcp"),
)
_LEFT_OUT = (*_WEIGHTS, ".py", ".partial")  # code is never copied
_MOST_BYTES = 64 * 2**20  # a tokenizer.json of 250,000 pieces has about 35 MB

_SPECIAL_TOKENS = (
    *("bos_token", "eos_token", "unk_token", "pad_token"),
    *("sep_token", "cls_token", "mask_token"),
)
_SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens")
# Common turn ends, for templates that only transformers can render.
_USUAL_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def is_weights(name: str) -> bool:
    """Returns whether a file of a model's folder contains weights or an index of them."""
    return name.endswith(_WEIGHTS)


def read_model_files(folder: Path) -> SmallFiles:
    """Reads the small files of a model's folder: all except weights, code and hidden files.

    Raises:
        UserError: If a file cannot be read, or a file that must be a JSON object is not.
    """
    try:
        names = [path.name for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None
    names = [name for name in names if not name.endswith(_LEFT_OUT)]
    return _read(folder, list(dict.fromkeys([*names, *chat_template_names(folder)])))


def read_tokenizer_files(tokenizer: Tokenizer) -> SmallFiles:
    """Reads a tokenizer's model file and the files that accompany it in its folder.

    The model file is stored under the name that transformers uses.

    Raises:
        UserError: If a file cannot be read, or a file that must be a JSON object is not.
    """
    path = tokenizer.model_path
    name = _MODEL_FILES[tokenizer.tokenizer_type]
    files = {name: path.read_bytes()}
    folder = path.parent
    others = [folder / other for other in _MODEL_FILES.values() if other != path.name]
    if path.name != name and any(other.is_file() for other in others):
        return files  # the other files belong to the model file with the usual name
    names = [*_BESIDE_TOKENIZER, *chat_template_names(folder)]
    if (folder / TOKENIZER_CONFIG).is_file():
        names += _VOCABULARY  # a complete tokenizer, possibly in both formats
    return {**_read(folder, list(dict.fromkeys(names))), **files}


def _read(folder: Path, names: list[str]) -> SmallFiles:
    files: SmallFiles = {}
    for name in names:
        path = folder / name
        try:
            if not path.is_file():
                continue
            if path.stat().st_size > _MOST_BYTES:
                logger.warning(
                    "%s: is larger than %d MB and is not copied", path, _MOST_BYTES >> 20
                )
                continue
            files[name] = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        if name in _JSON_OBJECTS:
            try:
                _check_added_tokens(name, _json_object(files, name))
            except ValueError as error:
                raise UserError(
                    f"{path}: is damaged ({error}); download the folder again"
                ) from None
    return files


def _check_added_tokens(name: str, content: Mapping[str, Any]) -> None:
    """Raises ValueError if the id of an added token is not an integer from 0 to 2**31 - 1."""
    ids: list[Any] = []
    if name == TOKENIZER_CONFIG and isinstance(content.get("added_tokens_decoder"), dict):
        ids = [int(k) if k.isdecimal() else k for k in content["added_tokens_decoder"]]
    elif name == _ADDED_TOKENS:
        ids = list(content.values())
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < 2**31:
            raise ValueError(f"an added token has the id {shorten(token_id)}")


def write_small_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes files into a folder. Each file is written atomically.

    Raises:
        UserError: If the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, data)
    except OSError as error:
        raise UserError(f"cannot write: {folder}: {error.strerror or error}") from error


def save_tokenizer(
    tokenizer: Tokenizer, folder: Path, chat_template: str | None, add_bos_token: bool | None
) -> None:
    """Writes a tokenizer and the files that accompany it; see `Tokenizer.save_pretrained`."""
    files = complete_tokenizer(read_tokenizer_files(tokenizer), tokenizer)
    if add_bos_token:
        files = with_bos(files, tokenizer)
    if chat_template is not None:
        files = with_chat_template(files, chat_template)
    write_small_files(folder, files)


def has_tokenizer(files: Mapping[str, bytes], tokenizer: Tokenizer) -> bool:
    """Returns whether the files contain exactly this tokenizer, by its fingerprint."""
    data = files.get(_MODEL_FILES[tokenizer.tokenizer_type])
    return data is not None and sha256_of(data) == tokenizer.fingerprint


def complete_tokenizer(files: Mapping[str, bytes], tokenizer: Tokenizer) -> SmallFiles:
    """Adds the tokenizer configuration that transformers needs, if it is missing.

    The files of a model's folder are returned unchanged, because config.json has the information.
    """
    if MODEL_CONFIG in files:
        return dict(files)
    config = _json_object(files, TOKENIZER_CONFIG)
    if tokenizer.tokenizer_type == "Llama2Tokenizer":
        if config:
            return dict(files)
        data = files[_MODEL_FILES[tokenizer.tokenizer_type]]
        return {**files, **sentencepiece_files(data, tokenizer)}
    if "tokenizer_class" in config:
        return dict(files)
    defaults = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special_tokens}
    return {**files, TOKENIZER_CONFIG: json_bytes({**defaults, **config})}


def replace_tokenizer(files: Mapping[str, bytes], tokenizer: Tokenizer) -> SmallFiles:
    """Replaces the tokenizer among the files, usually after its vocabulary has grown.

    The files that accompany the new tokenizer override those of the old one. Settings that they do
    not contain, such as the chat template, padding and `model_max_length`, are kept.

    Raises:
        UserError: If a file that accompanies the new tokenizer cannot be read.
    """
    if has_tokenizer(files, tokenizer):
        return dict(files)
    tokenizer_files = read_tokenizer_files(tokenizer)
    is_bare = TOKENIZER_CONFIG not in tokenizer_files
    old, new = (_json_object(given, TOKENIZER_CONFIG) for given in (files, tokenizer_files))
    if not old and _SPECIAL_TOKENS_MAP not in files:
        return {**{k: v for k, v in files.items() if k not in _VOCABULARY}, **tokenizer_files}
    has_templates = bool(chat_templates_in(tokenizer_files, tokenizer.model_path.parent))
    result = {
        name: data
        for name, data in files.items()
        if name not in (*_VOCABULARY, TOKENIZER_CONFIG)
        and not (
            has_templates and (name in _TEMPLATES or name.startswith(f"{CHAT_TEMPLATE_FOLDER}/"))
        )
    }
    if has_templates:
        old.pop("chat_template", None)
    known = _vocabulary_of(tokenizer_files[_MODEL_FILES[tokenizer.tokenizer_type]], tokenizer)
    lost = _drop_unknown_tokens(old, known)
    special = _json_object(files, _SPECIAL_TOKENS_MAP)
    lost |= _drop_unknown_tokens(special, known)
    if special:
        result[_SPECIAL_TOKENS_MAP] = json_bytes(special)
    if lost:
        logger.warning(
            "%s: has no %s of the old tokenizer, so the export omits it",
            tokenizer.model_path,
            ", ".join(lost),
        )
        for name in (MODEL_CONFIG, GENERATION_CONFIG):
            _drop_ids(result, name, set(lost.values()))
    if is_bare and tokenizer.tokenizer_type == "Llama2Tokenizer":
        post_processor = _json_object(files, "tokenizer.json").get("post_processor")
        made = sentencepiece_files(
            tokenizer_files["tokenizer.model"], tokenizer, old, post_processor
        )
        return {**made, **result, **tokenizer_files, TOKENIZER_CONFIG: made[TOKENIZER_CONFIG]}
    config = {**old, **new}
    if config != new:
        tokenizer_files[TOKENIZER_CONFIG] = json_bytes(config)
    return {**result, **tokenizer_files}


def _drop_ids(files: SmallFiles, name: str, lost: set[int]) -> None:
    """Removes the ids of lost tokens from the special ids in a JSON file."""
    content = _json_object(files, name)
    changed = False
    for key in SPECIAL_IDS:
        value = content.get(key)
        kept = [i for i in value if i not in lost] if isinstance(value, list) else value
        if kept != value or (isinstance(value, int) and value in lost):
            content[key] = kept if isinstance(value, list) and kept else None
            changed = True
    if changed:
        files[name] = json_bytes(content)


def _drop_unknown_tokens(config: dict[str, Any], known: Mapping[str, int]) -> dict[str, int]:
    """Removes tokens that are not in a vocabulary from a tokenizer's configuration.

    transformers would otherwise add them after the vocabulary, where the model has no embedding
    rows. Tokens that already have ids above the vocabulary are kept.

    Returns:
        The ids of the removed tokens by name, -1 for an unknown id.
    """
    lost: dict[str, int] = {}
    present = set(known)
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for token_id, token in list(decoder.items()):
            text = _content(token)
            if known.get(text) == int(token_id):
                continue
            if int(token_id) > max(known.values(), default=-1):
                present.add(text)
                continue
            lost[text] = int(token_id)
            del decoder[token_id]
    for name in _SPECIAL_TOKENS:
        text = _content(config.get(name))
        if text and text not in present:
            lost.setdefault(text, -1)
            del config[name]
    for name in _SPECIAL_LISTS:
        listed = config.get(name)
        if isinstance(listed, list):
            unknown = [_content(token) for token in listed if _content(token) not in present]
            lost |= {text: lost.get(text, -1) for text in unknown}
            config[name] = [token for token in listed if _content(token) in present]
    return lost


def _content(token: Any) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _vocabulary_of(data: bytes, tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the ids of all pieces and tokens in a tokenizer's model file, by name."""
    if tokenizer.tokenizer_type == "Llama2Tokenizer":
        model = sentencepiece_model_pb2.ModelProto()
        model.ParseFromString(data)
        return {piece.piece: token_id for token_id, piece in enumerate(model.pieces)}
    vocabulary: dict[str, int] = open_tokenizer_json(parse_tokenizer_json(data)).get_vocab()
    return vocabulary


def without_tokenizer(files: Mapping[str, bytes]) -> SmallFiles:
    """Removes the tokenizer and its chat templates from the files."""
    names = (*_VOCABULARY, TOKENIZER_CONFIG, _SPECIAL_TOKENS_MAP, *_TEMPLATES)
    return {
        name: data
        for name, data in files.items()
        if name not in names and not name.startswith(f"{CHAT_TEMPLATE_FOLDER}/")
    }


def token_ids(files: Mapping[str, bytes], tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the ids of all tokens by name, including tokens that only other files add."""
    ids = _vocabulary_of(files[_MODEL_FILES[tokenizer.tokenizer_type]], tokenizer)
    for text, token_id in _json_object(files, _ADDED_TOKENS).items():
        ids.setdefault(text, token_id)
    decoder = _json_object(files, TOKENIZER_CONFIG).get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for number, token in decoder.items():
            ids.setdefault(_content(token), int(number))
    return ids


def default_chat_template(files: Mapping[str, bytes], folder: Path) -> str | None:
    """Returns the Jinja source of the default chat template, or None if there is none.

    Raises:
        UserError: If a file with chat templates is damaged. The message names the folder.
    """
    return chat_templates_in(files, folder).get("default")


def with_chat_template(files: Mapping[str, bytes], source: str) -> SmallFiles:
    """Sets the Jinja source of the default chat template and keeps other named templates.

    The template is written to the place of the old one: a separate file or `tokenizer_config.json`.
    If neither exists, it is written to `chat_template.jinja`.
    """
    result = dict(files)
    if default_chat_template(files, Path()) == source:
        return result
    result.pop(_PROCESSOR_TEMPLATE, None)
    config = _json_object(files, TOKENIZER_CONFIG)
    in_folder = [name for name in files if name.startswith(f"{CHAT_TEMPLATE_FOLDER}/")]
    if CHAT_TEMPLATE_FILE in files or in_folder or TOKENIZER_CONFIG not in files:
        result.pop(f"{CHAT_TEMPLATE_FOLDER}/default.jinja", None)
        result[CHAT_TEMPLATE_FILE] = source.encode()
        if config.pop("chat_template", None) is not None:
            result[TOKENIZER_CONFIG] = json_bytes(config)
        return result
    named = config.get("chat_template")
    if isinstance(named, list):
        others = [entry for entry in named if entry.get("name") != "default"]
        config["chat_template"] = [{"name": "default", "template": source}, *others]
    else:
        config["chat_template"] = source
    result[TOKENIZER_CONFIG] = json_bytes(config)
    return result


def with_bos(files: Mapping[str, bytes], tokenizer: Tokenizer) -> SmallFiles:
    """Makes the tokenizer add BOS to every text, for a model that was trained with BOS.

    ``files`` are those that `complete_tokenizer` returns. They do not change if they already add
    BOS or there is no BOS token.
    """
    bos, result = tokenizer.special_tokens.get("bos_token"), dict(files)
    config, data = _json_object(files, TOKENIZER_CONFIG), files.get("tokenizer.json")
    if bos is None or tokenizer.bos_id < 0 or configured_bos(config, data, tokenizer.bos_id):
        return result
    result[TOKENIZER_CONFIG] = json_bytes({**config, "add_bos_token": True})
    # If there is a tokenizer.json, transformers 5 ignores `add_bos_token` and uses the
    # post-processor.
    if data is not None and not configured_bos({}, data, tokenizer.bos_id):
        content = json.loads(data)
        begun = with_special_tokens(content.get("post_processor"), [(bos, tokenizer.bos_id)])
        content["post_processor"] = begun
        result["tokenizer.json"] = json.dumps(content, ensure_ascii=False).encode()
    return result


def with_stop_tokens(
    files: Mapping[str, bytes],
    ids: Mapping[str, int],
    tokenizer: Tokenizer | None,
) -> SmallFiles:
    """Lists every token that ends an answer in `generation_config.json`.

    The stop tokens of the base model are kept, including those that only config.json lists. The
    token that ends a turn in the chat template is added.

    Args:
        files: The files of the export, including its chat template and tokenizer.
        ids: `bos_token_id`, `eos_token_id` and `pad_token_id` for a model without a base model.
        tokenizer: The tokenizer of the export, or None if it has none.
    """
    config = _json_object(files, GENERATION_CONFIG)
    if GENERATION_CONFIG not in files:
        of_model = _json_object(files, MODEL_CONFIG)
        config = {
            name: value
            for name in SPECIAL_IDS
            if (value := of_model.get(name, None if of_model else ids.get(name))) is not None
        }
        config["_from_model_config"] = False
    stops = config.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    listed = stops
    if not listed and "eos_token_id" in ids:
        listed = [ids["eos_token_id"]]
    ends = [] if tokenizer is None else _turn_end_ids(files, tokenizer)
    every = list(dict.fromkeys([*listed, *ends]))
    if GENERATION_CONFIG in files and every == stops:
        return dict(files)
    if every != stops:
        config["eos_token_id"] = every[0] if len(every) == 1 else every
    return {**files, GENERATION_CONFIG: json_bytes(config)}


def _turn_end_ids(files: Mapping[str, bytes], tokenizer: Tokenizer) -> list[int]:
    """Returns the ids of the tokens that end an answer in the chat template."""
    source = default_chat_template(files, Path())
    if source is None:
        return []
    ids = token_ids(files, tokenizer)
    config = _json_object(files, TOKENIZER_CONFIG)
    named = {name: text for name in _SPECIAL_TOKENS if (text := _content(config.get(name)))}
    decoder = config.get("added_tokens_decoder")
    added = [_content(token) for token in decoder.values()] if isinstance(decoder, dict) else []
    control = tuple(
        filter(None, dict.fromkeys([*tokenizer.control_tokens, *added, *named.values()]))
    )
    ends: list[str | None] = []
    # Render with the special tokens of training and with those that transformers reads.
    for special in (tokenizer.special_tokens, {**tokenizer.special_tokens, **named}):
        template = JinjaTemplate(CHAT_TEMPLATE_FILE, source, control, tuple(special.items()))
        ends.append(template.turn_end())
    if not any(ends):  # a template that only transformers can render
        ends = [name for name in _USUAL_TURN_ENDS if name in source]
    return list(dict.fromkeys(ids[name] for name in ends if name is not None and name in ids))


def _json_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """Parses one of the files as a JSON object, which is empty if the file is missing."""
    if name not in files:
        return {}
    content = parse_json(files[name])
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def json_bytes(content: Any) -> bytes:
    """Serializes the content of a JSON file with indentation."""
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()
