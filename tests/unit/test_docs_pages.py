"""Tests that the generated pages of `docs/` are up to date and links between pages resolve."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_chatflow.config import load_config_from_argv
from megatron_chatflow.config.flags import FLAGS
from megatron_chatflow.config.megatron_flags import DEFAULTS, PAGE, TABLE

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "tools/**/*.md", "examples/**/*.md", "csrc/**/*.md")
    for path in ROOT.glob(pattern)
)


def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "docs_reference", ROOT / "tools" / "docs_reference.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def anchors(text: str) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub and MkDocs generate them."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_generated_pages_are_up_to_date() -> None:
    for path, text in reference().pages().items():
        renew = f"{path.relative_to(ROOT)}: run python tools/docs_reference.py"
        assert path.read_text(encoding="utf-8") == text, renew


def test_every_value_of_a_choice_is_described() -> None:
    module = reference()
    for section in (module.SourceConfig, module.ScheduleConfig, module.KnotConfig):
        for key, kind, _, _ in module.keys_of(section):
            choices = re.findall(r"`(\w+)`", kind) if kind.startswith("`") else []
            if choices:
                assert list(module.VALUES_OF[section.__name__, key]) == choices


def test_no_page_has_marks_of_a_merge_conflict() -> None:
    marks = re.compile(r"^(<{7} |={7}$|>{7} )", re.M)
    assert [page for page in PAGES if marks.search(page.read_text(encoding="utf-8"))] == []


def test_every_flag_of_megatron_is_on_its_page() -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    assert all(f"`{name}" in text for name in TABLE)
    assert {flag.name for flag in FLAGS} >= set(DEFAULTS)


def test_the_launch_script_of_the_page_is_understood() -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    (command,) = re.findall(r"```bash\n(.*?)```", text, re.S)
    command = "".join(line for line in command.splitlines(True) if not line.startswith("#"))
    words = shlex.split(command.replace("\\\n", " "))
    config, options = load_config_from_argv(words[words.index("-m") + 2 :])
    assert list(config.data.sources) == ["en", "zh"] and config.data.split == "969,30,1"
    assert len(options.notes) == 5


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists():
            broken.append(target)
        elif anchor and anchor not in anchors(path.read_text(encoding="utf-8")):
            broken.append(target)
    assert not broken
