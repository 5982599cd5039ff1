"""Reading the configuration of the environment's real pip."""

from pathlib import Path

import pytest

from examples.corpus import pip_settings
from examples.corpus.pip_settings import PipSettings, make_opener, parse_config
from megatron_chatflow.errors import UserError


def test_later_sections_win_as_in_pip():
    listing = "\n".join(
        [
            ":env:.timeout='7'",
            "download.index-url='https://mirror.example/simple'",
            "global.index-url='https://first.example/simple'",
            "global.timeout='60'",
            "global.trusted-host='a.example\\nb.example'",
            "list.format='columns'",
            "nonsense",
        ]
    )
    assert parse_config(listing) == {
        "timeout": "7",
        "index-url": "https://mirror.example/simple",
        "trusted-host": "a.example\nb.example",
    }


def test_asks_the_real_pip(monkeypatch, tmp_path):
    config = tmp_path / "pip.conf"
    config.write_text("[global]\nextra-index-url = https://b.example/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.setenv("PIP_INDEX_URL", "https://a.example/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://b.example/simple https://c.example/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    settings = pip_settings.read_pip_settings()
    assert settings.index_urls == tuple(f"https://{name}.example/simple" for name in "abc")
    assert settings.find_links == (str(tmp_path),)


def test_pip_tells_its_default_index(monkeypatch):
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    assert pip_settings.read_pip_settings().index_urls[0].startswith("https://")


def test_no_index_leaves_find_links(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert pip_settings.read_pip_settings().index_urls == ()


def test_environment_without_pip(monkeypatch, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(pip_settings.sys, "executable", str(broken))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--archive-dir"):
        pip_settings.read_pip_settings()


def test_unreadable_certificates_are_named(tmp_path: Path):
    settings = PipSettings(index_urls=(), cert=str(tmp_path / "missing.pem"))
    with pytest.raises(UserError, match=r"missing\.pem"):
        make_opener(settings, "a.example")
