"""Writes the reference pages of `docs/` from the configuration, the flags and the templates.

``python tools/docs_reference.py`` updates the pages. ``--check`` compares them instead and lists
those that differ. A test runs the same comparison.
"""

from megatron_chatflow.errors import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # the imports below take seconds

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_chatflow.config.flags import FLAGS
from megatron_chatflow.config.megatron_flags import (
    DEFAULTS,
    PAGE,
    TABLE,
    VALUES,
    Accepted,
    Mapped,
    Refused,
)
from megatron_chatflow.config.sections import (
    ControllerConfig,
    KnotConfig,
    ScheduleConfig,
    SourceConfig,
    StageConfig,
)
from megatron_chatflow.config.validation import RunConfig
from megatron_chatflow.errors import ArgumentParser, UserError, run_main
from megatron_chatflow.preprocess.templates import (
    FAMILY_TEMPLATES,
    JINJA_TEMPLATES,
    document_of_chat,
)
from megatron_chatflow.tokenizer.chat_template import JinjaTemplate, chat_of_exchanges

DOCS = Path(__file__).parents[1] / "docs"
RENEW = "`python tools/docs_reference.py`"

# Description of each value of an enumerated field, by class, key and value.
VALUES_OF: dict[tuple[str, str], dict[str, str]] = {
    ("SourceConfig", "loss"): {
        "all": "every token of a sample counts in the loss, including prompts",
        "response": "only tokens that the dataset's loss mask marks: the answers of chats, and the "
        "translations of pairs that were written as instructions",
    },
    ("SourceConfig", "packing"): {
        "none": "documents are concatenated and cut every `seq_length` tokens; a document may "
        "continue in the next sample. Suited to plain text",
        "best_fit": "whole documents are packed into samples by best fit; the rest of a "
        "sample is padding without loss. Suited to chats and instructions",
    },
    ("SourceConfig", "boundaries"): {
        "ignore": "attention and positions run across the documents of a sample",
        "isolate": "attention stays inside a document, whose positions begin at 0",
    },
    ("KnotConfig", "ramp"): {
        "step": "the weights of the previous knot hold until this knot",
        "linear": "the weights change linearly from the previous knot to this one",
        "cosine": "the weights follow half a cosine from the previous knot to this one, as 64 "
        "linear chords",
    },
    ("ControllerConfig", "name"): {
        "odm": "online data mixing (arXiv 2312.02406): more weight to sources with a high training "
        "loss",
        "shearing": "dynamic batch loading (arXiv 2310.06694): more weight to sources whose "
        "validation loss is above its reference",
        "replay": "the recorded decisions of another run",
    },
    ("ScheduleConfig", "count"): {
        "samples": "a weight is the share of samples, which all have `seq_length` tokens",
        "tokens": "a weight is the share of tokens that are no padding; differs from `samples` with "
        "`packing: best_fit`",
        "loss_tokens": "a weight is the share of tokens that carry loss",
    },
    ("ScheduleConfig", "unit"): {
        "samples": "`at` counts samples of `seq_length` tokens",
        "tokens": "`at` counts tokens, `seq_length` for each sample",
        "iterations": "`at` counts global batches",
    },
}

EXAMPLE = """data:
  seq_length: 4096
  sources:
    english:
      paths: [data/en_text_document]
      max_epochs: 1                      # an error if the schedule reads it more than once
    chinese:
      paths: [data/zh_wiki_text_document, data/zh_news_text_document]
      validation_paths: [data/zh_valid_text_document]
    instruction:
      paths: [data/chat_messages_document]
      loss: response
      packing: best_fit
      boundaries: isolate
  schedule:
    unit: samples
    knots:
      - {at: 0,  weights: {english: 0.9, chinese: 0.1}}
      - {at: 2M, weights: {english: 0.3, chinese: 0.7}, ramp: linear}
      - {at: 3M, weights: {english: 0.1, chinese: 0.5, instruction: 0.4}, ramp: cosine}
"""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats a Markdown table."""
    lines = [columns, ["---"] * len(columns), *([c.replace("|", "\\|") for c in r] for r in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def keys_of(section: Any) -> Iterator[tuple[str, str, str, str]]:
    """Returns key, type, default and description of each field of a configuration class."""
    hints = get_type_hints(section, include_extras=True)
    plain = get_type_hints(section)
    for field in fields(section):
        info = section.__pydantic_fields__[field.name]
        if info.is_required():
            default = "required"
        elif info.get_default(call_default_factory=True) in (None, (), {}):
            default = "unset"
        else:
            default = f"`{shown(info.default)}`"
        kind = type_text(hints[field.name], plain[field.name])
        yield field.name, kind, default, info.description or ""


def type_text(hint: Any, plain: Any) -> str:
    """Describes a field's type in words."""
    arms = [a for a in (get_args(plain) if get_origin(plain) in (Union, UnionType) else (plain,))]
    arms = [arm for arm in arms if arm is not type(None)]
    kind = get_args(arms[0])[0] if get_origin(arms[0]) is Annotated else arms[0]
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if kind is bool:
        return "`true`, `false`"
    if get_origin(kind) is tuple:
        element = get_args(kind)[0]
        if get_origin(element) is Literal:
            return "list of " + ", ".join(f"`{value}`" for value in get_args(element))
        return "list of paths" if element is Path else "list"
    if get_origin(kind) is dict:
        return "mapping"
    if kind is Path:
        return "path"
    if kind is str:
        return "text"
    bounds = [meta for meta in getattr(hint, "__metadata__", ())]
    for arm in get_args(hint) if get_origin(hint) in (Union, UnionType) else ():
        bounds += list(getattr(arm, "__metadata__", ()))
    is_count = any("parse_count" in str(getattr(meta, "func", "")) for meta in bounds)
    words = {int: "count" if is_count else "integer", float: "number"}.get(kind, "mapping")
    return words


def shown(default: object) -> str:
    """Formats a default as in YAML."""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return "[" + ", ".join(map(str, default)) + "]"
    return str(default)


def flags_page() -> str:
    """Returns `docs/reference/flags.md`: every section of a run's configuration."""
    names = {(flag.section, flag.field): flag for flag in FLAGS}
    parts = [
        f"""# Flags and YAML keys

Each section below is a section of the YAML file given to `--config`, and each row a key of it. A key
with a flag can be set on the command line as well; a flag overrides the file. Boolean flags have a
negative form: `--no-bf16`. Counts may have a unit: `8K`, `5M`, `1.5B`, `1T`. `none` unsets a key that
has no default. `python -m megatron_chatflow.pretrain --help` prints the same list. This page is
generated by {RENEW}.

Options of the call: `--config FILE`, `--dry-run`, `--world-size N` (for the dry run), `--verbose`
(the dry run prints the resolved configuration as well).
"""
    ]
    for section, section_class in get_type_hints(RunConfig).items():
        rows = []
        for key, kind, default, text in keys_of(section_class):
            flag = names.get((section, key))
            name = f"`{flag.name}`" if flag else "YAML only"
            rows.append((f"`{key}`", name, kind, default, text))
        heading = (section_class.__doc__ or "").strip().split("\n")[0]
        parts.append(f"## `{section}`\n\n{heading}\n")
        parts.append(table(("key", "flag", "type", "default", "meaning"), rows))
    return "\n".join(parts)


def data_page() -> str:
    """Returns `docs/reference/data.md`: sources, schedule and chat templates."""
    parts = [
        f"""# Sources, schedule, templates

This page describes every key of `data.sources`, `data.schedule` and `train.stages`, and every built-in
chat template. It is generated by {RENEW}.

```yaml
{EXAMPLE}```

The keys of `data` itself, such as `seq_length` and `split`, are in
[Flags and YAML keys](flags.md#data).
"""
    ]
    titles = {
        SourceConfig: ("data.sources.NAME", "A source has a name of your choice and these keys."),
        ScheduleConfig: (
            "data.schedule",
            "A run with one source needs no schedule: the source has all the weight.",
        ),
        KnotConfig: (
            "data.schedule.knots[]",
            "Knots are listed in increasing order. The weights are constant before the first and "
            "after the last knot.",
        ),
        ControllerConfig: (
            "data.schedule.controller",
            "Decides the weights during the run, see [Controllers](../controllers.md).",
        ),
        StageConfig: (
            "train.stages[]",
            "Stages are listed in increasing order; see [Stages of training](../stages.md).",
        ),
    }
    for section, (title, text) in titles.items():
        rows = [(f"`{key}`", *rest) for key, *rest in keys_of(section)]
        parts.append(f"## `{title}`\n\n{text}\n")
        parts.append(table(("key", "type", "default", "meaning"), rows))
        for (owner, key), values in VALUES_OF.items():
            if owner == section.__name__:
                parts.append(f"`{key}` takes these values:\n")
                parts.append(table(("value", "effect"), [(f"`{v}`", t) for v, t in values.items()]))
    parts.append(
        """## Chat templates

`--template` of `tools/preprocess_data.py` selects one of these. The examples show a chat with a system
text and two exchanges; `⟦...⟧` marks the parts with loss (with `--loss response`), and `<s>` and `</s>`
stand for the tokenizer's BOS and end-of-sequence token. `--chat-template` takes a Jinja template instead.
"""
    )
    chat = chat_of_exchanges("You are helpful.", (("你好", "Hello!"), ("再见", "Goodbye!")))
    control = ("</s>", "<|im_end|>", "<|eot_id|>")
    special = (("bos_token", "<s>"), ("eos_token", "</s>"))
    for name in JINJA_TEMPLATES:
        source = FAMILY_TEMPLATES.get(name)
        template = JinjaTemplate(name, source, control, special) if source else name
        document = document_of_chat(chat, template, "response")
        text = "".join(
            f"⟦{part}⟧" if segment.loss else part
            for segment in document.segments
            for part in ["</s>" if segment.kind == "end" else segment.text]
        )
        parts.append(f"### `{name}`\n\n```text\n{text.replace('⟧⟦', '')}\n```\n")
    return "\n".join(parts)


MEGATRON_HEAD = """# Coming from Megatron-LM

`python -m megatron_chatflow.pretrain` accepts the flags of Megatron-LM's `pretrain_gpt.py` that apply
to the supported models. A flag that both have means the same in both. A flag that requests what is always the case
here is accepted, and one that has another name here is mapped; the log mentions each of them once at
the start. All flags that cannot be honoured are reported in one message, with what to use instead.
The tables below are generated from the table that the command line uses
(`megatron_chatflow/config/megatron_flags.yaml`).

## A launch script, before and after

A script for Megatron-LM usually works unchanged, apart from the name of the program. With
`--data-path` no YAML file is needed:

```bash
# before: torchrun --nproc-per-node 8 pretrain_gpt.py ...
torchrun --nproc-per-node 8 -m megatron_chatflow.pretrain \\
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32 \\
    --num-query-groups 32 --seq-length 4096 --max-position-embeddings 4096 \\
    --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear \\
    --tokenizer-type Llama2Tokenizer --tokenizer-model data/tokenizer.model \\
    --data-path 0.7 data/en_text_document 0.3 data/zh_text_document --split 969,30,1 \\
    --micro-batch-size 1 --global-batch-size 256 --train-iters 10000 --lr 3e-4 --bf16 \\
    --pretrained-checkpoint ckpt/llama2_7b --save runs/zh --load runs/zh --save-interval 500
```

## What loads, and what does not

| Megatron-LM has | here |
|---|---|
| `.bin/.idx` datasets | load as they are, and Megatron-LM reads ours |
| `preprocess_data.py`, `merge_datasets.py` | `tools/preprocess_data.py` and `tools/merge_datasets.py` take the same flags and write the same bytes |
| its checkpoints | do not load. Convert them to a Hugging Face folder with Megatron-LM's tools, then use `--load-hf` or `tools/convert_checkpoint.py import` |
| cached blending indices | are not needed: the blend is computed |

## Data

- `--data-path W1 P1 W2 P2` makes a source of each dataset, named by its file, and a blend with
  constant weights. Weights are normalized. Without weights, `--data-path P1 P2`, the datasets become
  one source whose epoch has every sample of both once.
- `--split 969,30,1` cuts the documents of every dataset in order and rounds as Megatron-LM does: the
  first 96.9 % are for training, the next 3 % for validation, the last 0.1 % for test. With
  `--data-path` this split also applies when none is given, as in Megatron-LM. `--eval-interval`
  enables validation; every source is validated separately, and the test documents are evaluated once,
  after the last iteration.
- `--train-data-path` and `--valid-data-path` are not split.
- A blend that changes over the run, loss masks and packing are set in the YAML file; see
  [The schedule](schedule.md).
"""


def megatron_page() -> str:
    """Returns `docs/coming_from_megatron.md`: the counterparts of Megatron-LM's flags."""
    ours = {flag.name: flag for flag in FLAGS}

    def on_off(default: object) -> str:
        return ("on" if default else "off") if isinstance(default, bool) else str(default)

    defaults = [(f"`{n}`", theirs, on_off(ours[n].default)) for n, theirs in DEFAULTS.items()]
    values = [(f"`{flag} {value}`", f"`{flag} {new}`") for (flag, value), new in VALUES.items()]
    accepted, mapped, refused = [], [], []
    for name, treatments in sorted(TABLE.items()):
        for one in treatments:
            match one:
                case Accepted(reason, allowed):
                    names = [name] if allowed is None else [f"{name} {part}" for part in allowed]
                    accepted.append((", ".join(f"`{part}`" for part in names), reason))
                case Mapped(shown_as, _):
                    mapped.append((f"`{name}`", shown_as))
                case Refused(instead):
                    other = " (other values)" if len(treatments) > 1 else ""
                    refused.append((f"`{name}`{other}", instead))
    parts = [
        MEGATRON_HEAD,
        "## Defaults that differ\n\nWhat applies when a script does not give the flag.\n",
        table(("flag", "Megatron-LM", "here"), defaults),
        "## Accepted flags\n\nA name that ends with `*` stands for all flags that begin so.\n",
        table(("flag", "why nothing has to be done"), accepted),
        "## Mapped flags\n",
        table(("flag", "becomes"), [*mapped, *values]),
        "## Refused flags\n",
        table(("flag", "use instead, or the reason"), refused),
    ]
    return "\n".join(parts)


def pages() -> dict[Path, str]:
    """Returns the generated pages by path."""
    return {
        DOCS / "reference/flags.md": flags_page(),
        DOCS / "reference/data.md": data_page(),
        DOCS.parent / PAGE: megatron_page(),
    }


def main() -> None:
    """Writes or checks the pages."""
    parser = ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="only check that the pages are up to date"
    )
    check = parser.parse_args().check
    stale = [
        (path, text)
        for path, text in pages().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    names = ", ".join(str(path.relative_to(DOCS.parent)) for path, _ in stale)
    if check and stale:
        raise UserError(f"out of date: {names}; run python tools/docs_reference.py")
    for path, text in stale:
        path.write_text(text, encoding="utf-8")
    print(f"wrote {names}" if stale else "all pages are up to date")


if __name__ == "__main__":
    run_main(main)
