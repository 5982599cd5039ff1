"""The page about coming from Megatron-LM is what the table of flags says."""

import re
import shlex
from pathlib import Path

from megatron_chatflow.config import load_config_from_argv
from megatron_chatflow.config.flags import FLAGS
from megatron_chatflow.config.megatron_flags import DEFAULTS, PAGE, TABLE
from megatron_chatflow.config.megatron_page import render_page

TEXT = (Path(__file__).parents[2] / PAGE).read_text(encoding="utf-8")


def test_the_page_equals_the_table() -> None:
    renew = f"python -m megatron_chatflow.config.megatron_page > {PAGE}"
    assert render_page() == TEXT, f"renew the page: {renew}"
    assert all(f"`{name}" in TEXT for name in TABLE)
    assert {flag.name for flag in FLAGS} >= set(DEFAULTS)


def test_the_command_of_the_page_is_understood() -> None:
    (command,) = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
    words = shlex.split(command.replace("\\\n", " "))
    config, options = load_config_from_argv(words[words.index("-m") + 2 :])
    assert list(config.data.sources) == ["en", "zh"] and config.data.split == "969,30,1"
    assert len(options.notes) == 5
