"""Reads Arrow files: `.arrow`, `.feather` (version 2), and data sets that `datasets` saved.

`datasets.Dataset.save_to_disk` writes a folder with a `state.json` that lists its `.arrow` files;
other `.arrow` files in the folder are caches. A saved `DatasetDict` has such a folder for each
split and a `dataset_dict.json` that lists them.
"""

import json
import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from megatron_chatflow import remote
from megatron_chatflow.errors import UserError
from megatron_chatflow.remote import RemoteFile

logger = logging.getLogger(__name__)
STATE_FILE, SPLITS_FILE = "state.json", "dataset_dict.json"
_FILE_MAGIC = b"ARROW1"  # of the file format; the stream format, which `datasets` writes, has none
_FEATHER_1_MAGIC = b"FEA1"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def wanted_columns(
    columns: Sequence[str] | None, names: Sequence[str], file_name: str
) -> list[str] | None:
    """Returns those of the wanted columns that a table has; None if all are wanted.

    A column may be a path in nested columns, such as "doc.text".

    Raises:
        UserError: The table has none of the columns.
    """
    if columns is None:
        return None
    wanted = [name for name in columns if name in names or name.split(".")[0] in names]
    if not wanted:
        raise UserError(
            f"no such column: {file_name}: has {', '.join(names)}, but none of "
            f"{', '.join(columns)}: set --json-keys or --pair-keys"
        )
    return wanted


def arrow_batches(
    stream: IO[bytes], path: Path | RemoteFile, name: str, columns: Sequence[str] | None
) -> Iterator[tuple[Any, float]]:
    """Yields the record batches of an Arrow file, and the share of the file read before each.

    A local file is mapped to memory, so a batch that is not compressed takes none until its values
    are used.

    Raises:
        UserError: The file has none of the columns or the version 1 of feather, or belongs to a
            saved data set and is truncated.
        pyarrow.ArrowException, OSError: The file is damaged.
    """
    from pyarrow import PythonFile, ipc, memory_map

    head = stream.read(len(_FILE_MAGIC))
    num_bytes = stream.seek(0, 2)
    stream.seek(max(0, num_bytes - len(_END_OF_STREAM)))
    tail = stream.read(len(_END_OF_STREAM))
    stream.seek(0)
    if head.startswith(_FEATHER_1_MAGIC):
        raise UserError(f"cannot read: {name}: is of version 1 of feather: convert it to parquet")
    source = memory_map(str(path)) if isinstance(path, Path) else PythonFile(stream, "r")
    if head == _FILE_MAGIC:
        schema = ipc.open_file(source).schema
    else:
        schema = ipc.open_stream(source).schema
    source.seek(0)
    wanted = wanted_columns(columns, schema.names, name)
    options = None
    if wanted is not None:
        indices = {
            schema.get_field_index(column if column in schema.names else column.split(".")[0])
            for column in wanted
        }
        options = ipc.IpcReadOptions(included_fields=sorted(indices))
    if head == _FILE_MAGIC:
        with ipc.open_file(source, options=options) as content:
            for number in range(content.num_record_batches):
                yield content.get_batch(number), number / content.num_record_batches
        return
    if tail != _END_OF_STREAM:
        if _is_of_saved_data(path):
            raise UserError(f"cannot read: {name}: it is truncated: copy the data set again")
        logger.warning("%s has no end mark, so it may be truncated", name)
    with ipc.open_stream(source, options=options) as content:
        share = 0.0
        for batch in content:
            yield batch, share
            share = source.tell() / num_bytes


def saved_files(folder: Path | str, names: Collection[str] | None = None) -> frozenset[str] | None:
    """Returns the names of the Arrow files of a data set saved in a folder; None if there is none.

    Args:
        folder: Path or URL of the folder.
        names: Names of the files in it. Without them, the files at a URL are not checked.

    Raises:
        UserError: The description of the data set is damaged, or a file is missing.
    """
    state = _read_json(folder, STATE_FILE)
    if not isinstance(state, dict) or "_data_files" not in state:
        return None
    try:
        listed = frozenset(str(entry["filename"]) for entry in state["_data_files"])
    except (TypeError, KeyError) as error:
        raise UserError(f"damaged data set: {folder}/{STATE_FILE}: save it again") from error
    if isinstance(folder, Path):
        missing = sorted(name for name in listed if not (folder / name).exists())
    else:
        missing = sorted(listed.difference(listed if names is None else names))
    if missing:
        raise UserError(f"incomplete data set: {folder}: {missing[0]} is missing: copy it again")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise UserError(
            f"data set with a selection of its rows: {folder}: save it again with a current "
            "version of datasets"
        )
    return listed


def check_splits(folder: Path | str, names: Collection[str]) -> None:
    """Raises `UserError` if a folder with the files ``names`` has several splits of a data set."""
    if SPLITS_FILE not in names:
        return
    content = _read_json(folder, SPLITS_FILE)
    splits = content.get("splits", []) if isinstance(content, dict) else []
    if len(splits) > 1:
        raise UserError(
            f"several splits: {folder}: has {', '.join(map(str, splits))}: give the folder of "
            f"one, such as {folder}/{splits[0]}"
        )


def _is_of_saved_data(path: Path | RemoteFile) -> bool:
    """Returns whether a file is listed by a saved data set in its folder."""
    folder: Path | str
    if isinstance(path, Path):
        folder, name = path.parent, path.name
    else:
        folder, _, name = path.url.rpartition("/")
        if folder.startswith(
            ("http://", "https://")
        ):  # it has no folders, and its files may need a query each
            return False
    return name in (saved_files(folder) or ())


def _read_json(folder: Path | str, name: str) -> Any:
    try:
        if isinstance(folder, Path):
            return json.loads((folder / name).read_bytes())
        content = remote.read_bytes(f"{folder}/{name}")
        return None if content is None else json.loads(content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read: {folder}/{name}: {error}") from error
