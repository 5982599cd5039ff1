"""The command line of a training run, generated from the fields of the configuration.

`parse_arguments` returns the values of the flags by section and field, and the `RunOptions`, which
apply to one invocation and are not part of the run's configuration.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from megatron_chatflow.config.megatron_flags import PAGE, TABLE, Translation, translate
from megatron_chatflow.config.problems import did_you_mean
from megatron_chatflow.config.validation import REMOVED, RunConfig
from megatron_chatflow.errors import ArgumentParser, UserError

_EXAMPLES = """examples:
  python -m megatron_chatflow.pretrain --config run.yaml --dry-run
  python -m megatron_chatflow.pretrain --config run.yaml --train-iters 2K --lr 3e-4 --no-bf16
  torchrun --nproc-per-node 2 -m megatron_chatflow.pretrain --config run.yaml \\
      --tensor-model-parallel-size 2 --sequence-parallel

Flags override the file, and the file overrides the defaults. Counts may have a unit (8K, 5M, 1.5B,
1T). `none` unsets a setting without a default. Sources, their schedule and stages are set only in
the file.
"""


@dataclass(frozen=True)
class RunOptions:
    """Options of one invocation that are not part of the run's configuration."""

    config: Path | None = None  # the YAML file, or None
    dry_run: bool = False  # whether to check the configuration and print the plan without training
    # Number of processes that a dry run assumes. None selects the smallest possible number.
    world_size: int | None = None
    verbose: bool = False  # whether a dry run also prints the resolved configuration
    simulate: bool = False  # whether a dry run also executes ranks on a simulated GPU
    gpu: str = "h100"  # the simulated GPU
    rank: str = "stages"  # the ranks to simulate: a rank, ``stages`` or ``all-distinct``
    output: Path | None = None  # file that receives the simulation's report as JSON; None for none
    notes: tuple[str, ...] = ()  # one line for each Megatron-LM flag that was accepted or mapped
    removed: tuple[str, ...] = ()  # given settings of earlier versions that have no effect


@dataclass(frozen=True)
class _Flag:
    section: str
    field: str
    kind: Any  # bool, int, float, str, Path, a Literal or a tuple of one of them
    is_optional: bool
    default: object  # None also if the field is required
    help: str

    @property
    def name(self) -> str:
        return "--" + self.field.replace("_", "-")

    @property
    def is_list(self) -> bool:
        """Whether the flag accepts several values."""
        return get_origin(self.kind) is tuple

    @property
    def element(self) -> Any:
        """The type of one value."""
        return get_args(self.kind)[0] if self.is_list else self.kind

    @property
    def destination(self) -> str:
        return f"{self.section}.{self.field}"

    def parse(self, text: str) -> object:
        """Converts the flag's text. Invalid text is returned as is, and validation reports it."""
        if self.is_optional and text.lower() in ("none", "null"):
            return None
        reader: Callable[[str], object] = self.element if self.element in (int, float) else str
        try:
            return reader(text)
        except ValueError:
            return text


def _flags() -> Iterator[_Flag]:
    for section, section_class in get_type_hints(RunConfig).items():
        hints = get_type_hints(section_class)
        for field in fields(section_class):
            kind = hints[field.name]
            arms = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
            kind = next(arm for arm in arms if arm is not type(None))
            if get_origin(kind) is Annotated:
                kind = get_args(kind)[0]
            if any(map(is_dataclass, (kind, *get_args(kind)))) or get_origin(kind) is dict:
                continue  # sources, schedule and stages have no flags
            info: FieldInfo = section_class.__pydantic_fields__[field.name]
            default = None if info.is_required() else info.default
            is_optional = type(None) in arms
            help_text = info.description or ""
            yield _Flag(section, field.name, kind, is_optional, default, help_text)


FLAGS = tuple(_flags())


def build_parser(*, with_options: bool = True) -> argparse.ArgumentParser:
    """Builds the argument parser of a training run.

    ``with_options`` is whether to include the options of the invocation, such as ``--config``.
    """
    parser = ArgumentParser(
        "Trains a language model on a blend of sources that follows a schedule.",
        _EXAMPLES,
        prog="python -m megatron_chatflow.pretrain",
        usage="%(prog)s --config YAML [--dry-run] [flags]",
        allow_abbrev=False,
    )
    if with_options:
        group = parser.add_argument_group("invocation")
        group.add_argument(
            "--config", type=Path, metavar="YAML", help="path of the run's configuration file"
        )
        group.add_argument(
            "--dry-run",
            action="store_true",
            help="check the configuration and the data, print the plan, and exit without training",
        )
        group.add_argument(
            "--world-size",
            type=int,
            metavar="N",
            help="number of processes that --dry-run assumes; the smallest possible one when unset",
        )
        group.add_argument(
            "--verbose",
            action="store_true",
            help="with --dry-run, also print the resolved configuration",
        )
        group.add_argument(
            "--simulate",
            action="store_true",
            help="with --dry-run, execute two steps and a validation on a simulated GPU and report "
            "memory, FLOPs, messages and where the host waits",
        )
        group.add_argument(
            "--gpu",
            metavar="NAME",
            help="GPU that --simulate simulates: a100-80, h100, h200, b200 or gb200 (default: "
            f"{RunOptions.gpu})",
        )
        group.add_argument(
            "--rank",
            metavar="N|stages|all-distinct",
            help="ranks that --simulate simulates: a rank, the first of every pipeline stage, or "
            f"all that may differ (default: {RunOptions.rank})",
        )
        group.add_argument(
            "--output",
            type=Path,
            metavar="FILE.json",
            help="with --simulate, also write the report to this file",
        )
    for section, section_class in get_type_hints(RunConfig).items():
        summary = (section_class.__doc__ or "").splitlines()[0]
        group = parser.add_argument_group(section, summary)
        for flag in FLAGS:
            if flag.section == section:
                _add(group, flag)
    for path in REMOVED:
        name = "--" + path.partition(".")[2].replace("_", "-")
        parser.add_argument(name, dest=path, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _add(group: Any, flag: _Flag) -> None:
    text = flag.help.replace("%", "%%")
    if flag.default is not None:
        default = str(flag.default).lower() if flag.kind is bool else flag.default
        if isinstance(default, tuple):
            default = " ".join(map(str, default))
        text += f" (default: {default})"
    common = {"dest": flag.destination, "default": argparse.SUPPRESS, "help": text}
    if flag.kind is bool:
        group.add_argument(flag.name, action=argparse.BooleanOptionalAction, **common)
        return
    if get_origin(flag.element) is Literal:
        metavar = "{" + ",".join(get_args(flag.element)) + "}"
    else:
        metavar = {int: "N", float: "X", str: "NAME", Path: "PATH"}[flag.element]
    several = {"nargs": "+"} if flag.is_list else {}
    group.add_argument(flag.name, type=flag.parse, metavar=metavar, **several, **common)


def parse_arguments(
    arguments: Sequence[str], *, with_options: bool = True
) -> tuple[dict[str, dict[str, Any]], RunOptions]:
    """Parses a command line without the program's name.

    Returns:
        The raw values of the given flags, by section and field, and the options of the invocation.

    Raises:
        UserError: If flags are unknown, or are Megatron-LM flags that are not supported (the
            message lists all of them), or if a flag has no value.
    """
    parser = build_parser(with_options=with_options)
    known = {name for action in parser._actions for name in action.option_strings}
    translation = translate(arguments, known)
    _refuse(translation, known)
    namespace, stray = parser.parse_known_args(translation.arguments)
    if stray:
        raise UserError(f"{stray[0]}: unexpected value without a flag; see --help")
    given = vars(namespace)
    values = translation.values
    for flag in FLAGS:
        if flag.destination in given:
            value = given[flag.destination]
            values.setdefault(flag.section, {})[flag.field] = None if value == [None] else value
    for path in REMOVED:
        if path in given:
            section, _, name = path.partition(".")
            values.setdefault(section, {})[name] = given[path]
    names = [field.name for field in fields(RunOptions)]
    options = {name: given[name] for name in names if given.get(name) is not None}
    _check_options(options)
    return values, RunOptions(**options, notes=tuple(translation.notes))


def _check_options(options: Mapping[str, Any]) -> None:
    """Rejects options that would have no effect."""
    if options.get("simulate") and not options.get("dry_run"):
        raise UserError("--simulate: needs --dry-run; add it, or remove --simulate to train")
    for name in ("gpu", "rank", "output"):
        if name in options and not options.get("simulate"):
            raise UserError(f"--{name}: needs --dry-run --simulate; add them, or remove --{name}")


class FlagsError(UserError):
    """Raised for unsupported flags. The limit is high because the message lists every flag."""

    max_characters = 16_000


def _refuse(translation: Translation, known: Iterable[str]) -> None:
    """Reports all unknown and unsupported flags in one error."""
    names = [*known, *(name for name in TABLE if not name.endswith("*"))]
    problems = [f"{flag}: unknown flag{did_you_mean(flag, names)}" for flag in translation.unknown]
    problems += [f"{flag}: not supported ({text})" for flag, text in translation.refused]
    if not problems:
        return
    where = f"see {PAGE}" if translation.refused else "see --help"
    count = f"{len(problems)} flags: " if len(problems) > 1 else ""
    raise FlagsError(f"{count}{'; '.join(problems)}; {where}")
