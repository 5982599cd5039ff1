"""The page about coming from Megatron-LM, made from the table of its flags.

``python -m megatron_chatflow.config.megatron_page > docs/coming_from_megatron.md`` renews it.
"""

from collections.abc import Iterable, Sequence

from megatron_chatflow.config.flags import FLAGS
from megatron_chatflow.config.megatron_flags import (
    DEFAULTS,
    TABLE,
    VALUES,
    Accepted,
    Mapped,
    Refused,
)

_HEAD = """# Coming from Megatron-LM

`python -m megatron_chatflow.pretrain` takes the flags of Megatron-LM's `pretrain_gpt.py` that
apply to a LLaMA. A flag that both have means the same. A flag that asks for what is so anyway
is accepted, one that is said otherwise here is mapped; each is logged once at the start. All
flags that cannot be honoured are reported in one message, with what to use instead. This page
is made from the table that the command line uses
(`megatron_chatflow/config/megatron_flags.py`).

With `--data-path` no YAML file is needed:

```bash
torchrun --nproc-per-node 8 -m megatron_chatflow.pretrain \\
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32 \\
    --num-query-groups 32 --seq-length 4096 --max-position-embeddings 4096 \\
    --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear \\
    --tokenizer-type Llama2Tokenizer --tokenizer-model data/tokenizer.model \\
    --data-path 0.7 data/en_text_document 0.3 data/zh_text_document --split 969,30,1 \\
    --micro-batch-size 1 --global-batch-size 256 --train-iters 10000 --lr 3e-4 --bf16 \\
    --pretrained-checkpoint ckpt/llama2_7b --save runs/zh --load runs/zh --save-interval 500
```

## Data

- `--data-path W1 P1 W2 P2` makes a source of each dataset, named by its file, and a blend whose
  weights stay constant. Weights are normalized. Without weights, `--data-path P1 P2`, the
  datasets become one source whose epoch has every sample of both once.
- `--split 969,30,1` cuts the documents of every dataset in order and rounds as Megatron-LM
  does: the first 96.9 % are for training, the next 3 % for validation, the last 0.1 % for test.
  With `--data-path` this split holds also where none is given, as in Megatron-LM.
  `--eval-interval` turns validation on; every source is validated by itself, and the test
  documents are evaluated once, after the last iteration.
- `--train-data-path` and `--valid-data-path` are not split.
- A blend that changes over the run, loss masks and packing are said in the YAML file, see the
  README.
"""


def render_page() -> str:
    """The page as Markdown."""
    ours = {flag.name: flag for flag in FLAGS}
    defaults = [
        (f"`{name}`", theirs, _shown(ours[name].default)) for name, theirs in DEFAULTS.items()
    ]
    values = [(f"`{flag} {value}`", f"`{flag} {new}`") for (flag, value), new in VALUES.items()]
    accepted, mapped, refused = [], [], []
    for name, treatments in sorted(TABLE.items()):
        for one in treatments:
            match one:
                case Accepted(reason, allowed):
                    shown = [name] if allowed is None else [f"{name} {part}" for part in allowed]
                    accepted.append((", ".join(f"`{part}`" for part in shown), reason))
                case Mapped(shown_as, _):
                    mapped.append((f"`{name}`", shown_as))
                case Refused(instead):
                    other = " (other values)" if len(treatments) > 1 else ""
                    refused.append((f"`{name}`{other}", instead))
    parts = [
        _HEAD,
        "## Defaults that differ\n\nWhat holds where a script does not give the flag.\n",
        _table(("flag", "Megatron-LM", "here"), defaults),
        "## Accepted\n\nA name that ends with `*` stands for all flags that begin so.\n",
        _table(("flag", "why there is nothing to do"), accepted),
        "## Mapped\n",
        _table(("flag", "becomes"), [*mapped, *values]),
        "## Refused\n",
        _table(("flag", "use instead, or why"), refused),
    ]
    return "\n".join(parts)


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return str(default)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(render_page(), end="")
