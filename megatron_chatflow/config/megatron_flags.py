"""Translates Megatron-LM flags that ChatFlow does not have under the same name.

`TABLE`, which is read from ``megatron_flags.yaml``, contains every flag of Megatron-LM's training
arguments that is not also a flag of ChatFlow. Each flag is handled in one of three ways:

* *accepted*: it requests the behavior that always applies, or has no effect on the result,
* *mapped*: it is replaced by other flags or settings,
* *refused*: it is an error, and the message names an alternative or the reason.

`translate` applies the table to a command line. `tools/docs_reference.py` generates a page from it.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_chatflow.errors import UserError

PAGE = "docs/coming_from_megatron.md"
DEFAULT_SPLIT = "969,30,1"
"""Megatron-LM's default of --split for --data-path."""


@dataclass(frozen=True)
class Accepted:
    """A flag that requests the behavior that always applies, or that has no effect."""

    reason: str  # why the flag needs no action
    values: tuple[str, ...] | None = None  # the values that are accepted, or None for any value


@dataclass(frozen=True)
class Mapped:
    """A flag that is replaced by other flags or settings."""

    shown: str  # the replacement as text for notes and documentation
    # The replacement as arguments, with ``{}`` for the flag's value. None if the flag needs code of
    # its own in `_apply`.
    arguments: str | None = None


@dataclass(frozen=True)
class Refused:
    """A flag for a feature that is not supported."""

    instead: str  # the alternative, or the reason why there is none


Treatment = Accepted | Mapped | Refused

# Replacements for values of flags that exist in both Megatron-LM and ChatFlow.
VALUES: dict[tuple[str, str], str] = {
    ("--tokenizer-type", "GPTSentencePieceTokenizer"): "Llama2Tokenizer",
    ("--attention-backend", "fused"): "cudnn",
    ("--attention-backend", "unfused"): "sdpa",
    ("--attention-backend", "local"): "sdpa",
}

# Megatron-LM's defaults of flags that exist in both but have another default in ChatFlow.
DEFAULTS: dict[str, str] = {
    "--adam-beta2": "0.999",
    "--async-save": "off",
    "--bf16": "off (fp32)",
    "--distributed-timeout-minutes": "10",
    "--eval-iters": "100",
    "--fp8-recipe": "delayed",
    "--log-interval": "100",
    "--lr-decay-style": "linear",
    "--tokenizer-type": "none",
    "--transformer-impl": "transformer_engine",
    "--untie-embeddings-and-output-weights": "off (tied)",
    "--weight-decay": "0.01",
}


def _build_table() -> dict[str, list[Treatment]]:
    """Builds the table of treatments by flag. A name that ends with ``*`` is a prefix of flags."""
    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    content: dict[str, dict[str, Any]] = yaml.load(text, Loader=loader)  # noqa: S506
    table: dict[str, list[Treatment]] = {}
    for reason, flags in content["accepted"].items():
        for entry in flags.split():
            name, _, values = entry.partition("=")
            given = tuple(values.split("|")) if values else None
            table.setdefault(name, []).append(Accepted(reason, given))
    for name, entry in content["mapped"].items():
        arguments = entry.get("arguments")
        shown = entry.get("shown") or f"`{arguments.replace('{}', 'VALUE')}`"
        table.setdefault(name, []).append(Mapped(shown, arguments))
    for instead, flags in content["refused"].items():
        for name in flags.split():
            table.setdefault(name, []).append(Refused(instead))
    return table


TABLE = _build_table()


def treatments(flag: str) -> list[Treatment]:
    """Returns the treatments of a flag in order of precedence, or an empty list if it is unknown.

    The first treatment that fits the flag's values applies.
    """
    if flag in TABLE:
        return TABLE[flag]
    families = [name for name in TABLE if name.endswith("*") and flag.startswith(name[:-1])]
    return TABLE[max(families, key=len)] if families else []


@dataclass
class Translation:
    """A translated command line."""

    arguments: list[str] = field(default_factory=list)  # the arguments for ChatFlow's own parser
    # values by section and field that were set by flags without an equivalent flag
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    # one line for each Megatron-LM flag that was accepted or mapped
    notes: list[str] = field(default_factory=list)
    # flags that exist in neither Megatron-LM nor ChatFlow
    unknown: list[str] = field(default_factory=list)
    # Megatron-LM flags that are not supported, and what to use instead
    refused: list[tuple[str, str]] = field(default_factory=list)


def translate(arguments: Sequence[str], known: Collection[str]) -> Translation:
    """Replaces Megatron-LM flags in a command line.

    Of ChatFlow's own flags, which are ``known``, only values in `VALUES` are replaced.
    """
    result = Translation()
    mapped: list[str] = []
    blends: dict[str, list[str]] = {}
    for words in _groups(arguments):
        flag, values = _parse_group(words)
        if not flag or flag in known:
            own = [VALUES.get((flag, value), value) for value in values]
            result.notes += [
                f"{flag} {value}: {new}"
                for value, new in zip(values, own, strict=True)
                if value != new
            ]
            result.arguments += words if own == values else [flag, *own]
            continue
        found = _fitting(flag, values)
        match found:
            case None:
                result.unknown.append(flag)
            case Accepted(reason):
                result.notes.append(f"{' '.join([flag, *values])}: {reason}")
            case Mapped(shown, None):
                result.notes.append(f"{flag}: {shown}")
                _apply(flag, values, result, blends)
            case Mapped(shown, template):
                assert template is not None
                if ("{}" in template) != (len(values) == 1):
                    needed = "one value" if "{}" in template else "no value"
                    raise UserError(f"{flag}: takes {needed}, not {len(values)}; see {PAGE}")
                mapped += template.replace("{}", "".join(values)).split()
                result.notes.append(f"{flag}: {shown}")
            case Refused(instead):
                result.refused.append((" ".join([flag, *values[:1]]), instead))
    # ChatFlow's own flags come last, so they override the replacements of Megatron-LM flags.
    result.arguments = [*mapped, *result.arguments]
    _set_blend(blends, result)
    return result


def _groups(arguments: Iterable[str]) -> Iterator[list[str]]:
    """Yields each flag with its values. Values before the first flag form a group of their own."""
    words: list[str] = []
    for word in arguments:
        if words and (word.startswith("--") or word == "-h"):
            yield words
            words = []
        words.append(word)
    if words:
        yield words


def _parse_group(words: list[str]) -> tuple[str, list[str]]:
    """Splits a group into its flag ("" if there is none) and its values, also after ``=``."""
    if not words[0].startswith("--"):
        return "", words
    flag, is_joined, value = words[0].partition("=")
    return flag, [value, *words[1:]] if is_joined else words[1:]


def _fitting(flag: str, values: Sequence[str]) -> Treatment | None:
    found = treatments(flag)
    for one in found:
        if not isinstance(one, Accepted) or one.values is None:
            return one
        if len(values) == 1 and any(_same(values[0], value) for value in one.values):
            return one
    if not found:
        return None
    allowed = [value for one in found if isinstance(one, Accepted) for value in one.values or ()]
    return Refused(f"only {' or '.join(allowed)}")


def _same(one: str, other: str) -> bool:
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other


def _apply(flag: str, values: list[str], result: Translation, blends: dict[str, list[str]]) -> None:
    """Applies a mapped flag that cannot be expressed as arguments."""
    match flag:
        case "--tensorboard-dir":
            result.arguments.append("--tensorboard")
        case "--lr-warmup-fraction":
            result.values.setdefault("optimizer", {})["lr_warmup_fraction"] = _fraction(values)
        case "--data-args-path":
            if len(values) != 1:
                raise UserError("--data-args-path: takes one file")
            try:
                blends["--data-path"] = Path(values[0]).read_text(encoding="utf-8").split()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"--data-args-path: {values[0]}: {error}") from None
        case "--data-path" | "--train-data-path" | "--valid-data-path":
            blends[flag] = values
        case _:
            result.values.setdefault("data", {})["boundaries"] = "isolate"


def _fraction(values: Sequence[str]) -> float:
    try:
        (fraction,) = map(float, values)
    except ValueError:
        fraction = -1.0
    if not 0 <= fraction <= 1:
        raise UserError(f"--lr-warmup-fraction: must be one number from 0 to 1, not {values}")
    return fraction


def read_blend(flag: str, words: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Parses a Megatron-LM blend: ``0.7 a 0.3 b``, or ``a b`` without weights.

    Returns the dataset prefixes, and their weights or None.
    """
    numbers = [_number(word) for word in words]
    prefixes, weights = list(words[1::2]), numbers[0::2]
    if len(words) % 2 == 0 and words and None not in weights:
        if not any(number is not None for number in numbers[1::2]):
            given = [weight for weight in weights if weight is not None]
            if min(given) < 0 or not sum(given) > 0 or sum(given) == float("inf"):
                raise UserError(f"{flag}: weights must be 0 or more, and one of them above 0")
            return prefixes, given
    if words and all(number is None for number in numbers):
        return list(words), None
    raise UserError(
        f"{flag}: give prefixes of datasets, or a weight before each: {flag} 0.7 data/en_document "
        "0.3 data/zh_document"
    )


def _number(word: str) -> float | None:
    try:
        number = float(word)
    except ValueError:
        return None
    return None if number != number else number


def source_names(prefixes: Sequence[str]) -> list[str]:
    """Derives a unique source name from each dataset prefix, without the preprocessing suffixes."""
    names: list[str] = []
    for prefix in prefixes:
        stem = re.sub(r"(_(text|content|messages))?_(document|sentence)$", "", Path(prefix).name)
        name, number = stem or "data", 2
        while name in names:
            name, number = f"{stem}_{number}", number + 1
        names.append(name)
    return names


def _set_blend(blends: Mapping[str, list[str]], result: Translation) -> None:
    """Sets the sources and a constant schedule from --data-path or --train-data-path."""
    flag = next((name for name in ("--data-path", "--train-data-path") if name in blends), None)
    if flag is None:
        if blends:
            raise UserError("--valid-data-path: needs --train-data-path")
        return
    if "--data-path" in blends and len(blends) > 1:
        raise UserError(
            "--data-path: applies to all splits; remove --train-data-path and --valid-data-path"
        )
    prefixes, weights = read_blend(flag, blends[flag])
    sources: dict[str, dict[str, Any]]
    if weights is None:  # one source of all datasets, so each epoch contains each sample once
        name = source_names(prefixes)[0] if len(prefixes) == 1 else "data"
        sources, shares = {name: {"paths": prefixes}}, {name: 1.0}
    else:
        names = source_names(prefixes)
        sources = {name: {"paths": [path]} for name, path in zip(names, prefixes, strict=True)}
        shares = dict(zip(names, weights, strict=True))
    if "--valid-data-path" in blends:
        _set_validation(sources, read_blend("--valid-data-path", blends["--valid-data-path"])[0])
    data = result.values.setdefault("data", {})
    data["sources"] = sources
    data["schedule"] = {"knots": [{"at": 0, "weights": shares}]}
    if flag == "--data-path":
        data["default_split"] = DEFAULT_SPLIT


def _set_validation(sources: Mapping[str, dict[str, Any]], paths: list[str]) -> None:
    if len(sources) == 1:
        next(iter(sources.values()))["validation_paths"] = paths
        return
    if len(paths) != len(sources):
        raise UserError(
            f"--valid-data-path: {len(paths)} datasets for {len(sources)} of --train-data-path; "
            "give one for each, or name validation_paths in the YAML file"
        )
    for source, path in zip(sources.values(), paths, strict=True):
        source["validation_paths"] = [path]
