"""An output folder that tests write, interrupt and read."""

from pathlib import Path

from megatron_chatflow.files import new_folder

FILES = ("mark", "weights", "inner/file")


def write_folder(output: Path, content: str) -> None:
    """Writes an output folder whose files all hold ``content``."""
    with new_folder(output, overwrite=True, mark="mark", num_bytes=1) as folder:
        (folder / "inner").mkdir()
        for name in FILES:
            (folder / name).write_text(content)


def content_of(output: Path) -> str | None:
    """Returns the content of a complete folder, or None if there is no folder."""
    if not output.exists():
        return None
    (content,) = {(output / name).read_text() for name in FILES}
    assert len(list(output.rglob("*"))) == len(FILES) + 1
    return content
