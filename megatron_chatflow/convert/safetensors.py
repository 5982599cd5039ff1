"""Hugging Face weight files: read tensor by tensor, and written so.

In: a folder with safetensors shards, one safetensors file, or `.bin` files. Out: tensors by name;
or new shards with their index, of which one tensor at a time is in memory. The format (an 8-byte
header length, a JSON header, raw values) is documented at https://github.com/huggingface/safetensors
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_chatflow.checkpoint.reader import tensor_fault
from megatron_chatflow.errors import UserError

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


# Headers are a few hundred bytes a tensor; the format allows 100 MB.
_MAX_HEADER_BYTES = 100_000_000


class SafetensorsFile:
    """One safetensors file, read and not mapped, so that memory holds no more than is asked for.

    Attributes:
        entries: Tensor name to the header's ``dtype``, ``shape`` and ``data_offsets``.
    """

    entries: dict[str, dict[str, Any]]

    def __init__(self, path: Path) -> None:
        """Reads the header.

        Raises:
            UserError: The file is cut short or no safetensors file.
        """
        self.path = path
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                raw = file.read(min(length, _MAX_HEADER_BYTES))
            self._begin = 8 + length
            header: Any = json.loads(raw, object_pairs_hook=_without_repeats)
            num_bytes = path.stat().st_size - self._begin
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError):
            raise UserError(
                f"{path}: is damaged, or no safetensors file (its header cannot be read); fetch it "
                "again"
            ) from None
        entries: dict[str, Any] = header if isinstance(header, dict) else {"": None}
        metadata = entries.get("__metadata__")
        if metadata is not None and not (
            isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())
        ):
            raise UserError(
                f"{path}: is damaged at __metadata__ (no object of texts); fetch it again"
            )
        self.entries = {name: entries[name] for name in entries if name != "__metadata__"}
        for name, entry in self.entries.items():
            fault = _fault(entry, num_bytes)
            if fault is not None:
                raise UserError(
                    f"{path}: is damaged at {name or 'its header'} ({fault}); fetch it again"
                )
        place = _misplaced(self.entries, num_bytes)
        if place is not None:
            raise UserError(
                f"{path}: is damaged at {place} (values overlap or belong to no tensor); fetch it "
                "again"
            )

    def read(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> torch.Tensor:
        """Reads a tensor of a known dtype, or a part of it and no more than that part.

        Args:
            name: Which tensor, of one or two axes.
            rows: Part of the first axis.
            columns: Part of the second one.

        Raises:
            UserError: The file cannot be read.
        """
        entry = self.entries[name]
        dtype = _TORCH_DTYPES[entry["dtype"]]
        shape: list[int] = entry["shape"]
        width = _num_values(tuple(shape[1:])) * dtype.itemsize
        begin, _ = entry["data_offsets"]
        first, last, _ = rows.indices(shape[0])
        left, right, _ = columns.indices(shape[1] if len(shape) > 1 else 1)
        is_whole = len(shape) == 1 or right - left == shape[1]
        tensor = torch.empty(
            [last - first, *([] if len(shape) == 1 else [right - left])], dtype=dtype
        )
        # Whole rows lie behind each other; of parts of rows, each is read on its own.
        places = [first * width]
        if not is_whole:
            places = [row * width + left * dtype.itemsize for row in range(first, last)]
        target = tensor.view(-1).view(torch.uint8).numpy().data
        size = len(target) // max(len(places), 1)
        try:
            with open(self.path, "rb", buffering=0) as file:
                for number, place in enumerate(places):
                    file.seek(self._begin + begin + place)
                    part = target[number * size : (number + 1) * size]
                    while len(part) and (count := file.readinto(part)):
                        part = part[count:]  # one call reads at most 2 GiB
                    if len(part):
                        raise UserError(f"{self.path}: is damaged at {name}; fetch it again")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
        return tensor


def _fault(entry: Any, num_bytes: int) -> str | None:
    """What is wrong with a header's entry: its form, or that its values are not in the file."""
    keys = ("dtype", "shape", "data_offsets")
    if not isinstance(entry, dict) or any(key not in entry for key in keys):
        return "no entry of a tensor"
    dtype, shape, offsets = (entry[key] for key in keys)
    if not (isinstance(dtype, str) and _are_counts(shape) and _are_counts(offsets)):
        return "no entry of a tensor"
    if len(offsets) != 2 or not offsets[0] <= offsets[1] <= num_bytes:
        return "values are missing at the file's end"
    known = _TORCH_DTYPES.get(dtype)
    if known and offsets[1] - offsets[0] != _num_values(tuple(shape)) * known.itemsize:
        return "its shape is not that of its values"
    return None


def _misplaced(entries: Mapping[str, Mapping[str, Any]], num_bytes: int) -> str | None:
    """The first tensor whose values do not begin where the last one's end; None if all do.

    The format wants every byte behind the header to be exactly one tensor's.
    """
    end = 0
    for name in sorted(entries, key=lambda name: entries[name]["data_offsets"]):
        begin, next_begin = entries[name]["data_offsets"]
        if begin != end:
            return name
        end = next_begin
    return None if end == num_bytes else "its end"


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file.

    Raises:
        ValueError: A key is in it twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _are_counts(values: Any) -> bool:
    """Whether these are whole numbers, none negative."""
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


class HuggingFaceWeights:
    """The tensors of a Hugging Face folder.

    Attributes:
        folder: Where it lies.
        files: Tensor name to the file that holds it.
    """

    def __init__(self, folder: Path) -> None:
        """Opens a folder.

        Raises:
            UserError: It has no weights, or its index names files that are not there.
        """
        self.folder = folder
        self._headers: dict[Path, SafetensorsFile] = {}
        self._maps: dict[Path, Mapping[str, torch.Tensor]] = {}
        self.files = self._find_files()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        if self._is_safe(name):
            return tuple(self._safe(self.files[name]).entries[name]["shape"])
        return tuple(self._pickled(self.files[name])[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor.

        Raises:
            UserError: It is none of fp32, bf16 and fp16.
        """
        path = self.files[name]
        if self._is_safe(name):
            dtype = _TORCH_DTYPES.get(self._safe(path).entries[name]["dtype"])
        else:
            dtype = self._pickled(path)[name].dtype
        if dtype not in _DTYPE_NAMES:
            raise UserError(
                f"{path}: {name} is neither fp32, bf16 nor fp16; "
                "convert a folder that is not quantised"
            )
        return dtype

    def read(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> torch.Tensor:
        """Reads a tensor, or some of its rows and columns.

        Raises:
            UserError: Its file is damaged.
        """
        path = self.files[name]
        if self._is_safe(name):
            return self._safe(path).read(name, rows, columns)
        whole = self._pickled(path)[name].detach()
        return whole[rows] if whole.dim() == 1 else whole[rows, columns]

    def _find_files(self) -> dict[str, Path]:
        for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
            index = self.folder / f"{stem}.{suffix}.index.json"
            single = self.folder / f"{stem}.{suffix}"
            if index.is_file():
                files = self._read_index(index)
                if single.is_file() and single not in files.values():
                    raise UserError(
                        f"{self.folder}: has {single.name} and {index.name}, which does not name "
                        "it, so there are two models; remove one of the two files"
                    )
                return files
            if single.is_file():
                return dict.fromkeys(self._names(single), single)
        raise UserError(
            f"{self.folder}: has no model.safetensors, no index of shards and no "
            "pytorch_model.bin; name a Hugging Face model folder"
        )

    def _read_index(self, index: Path) -> dict[str, Path]:
        try:
            content = json.loads(
                index.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats
            )
            weight_map = content["weight_map"]
            files = {str(name): self.folder / str(file) for name, file in weight_map.items()}
            listed = {path.name for path in self.folder.iterdir() if path.is_file()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{index}: is damaged; fetch it again") from None
        found: dict[str, Path] = {}
        for path in sorted(set(files.values())):
            if path.parent != self.folder or path.name not in listed:
                shown = repr(str(path))[1:-1]  # the name may hold anything
                raise UserError(f"{shown}: is missing, and {index.name} names it; fetch it again")
            held = set(self._names(path))
            lost = [name for name, file in files.items() if file == path and name not in held]
            if lost:
                raise UserError(f"{path}: lacks {lost[0]}, which {index.name} places there")
            twice = next((name for name in sorted(held) if name in found), None)
            if twice is not None:
                raise UserError(
                    f"{path}: has {ascii(twice)[1:-1]}, as has {found[twice].name}; fetch the "
                    "folder again"
                )
            found |= dict.fromkeys(held, path)
        return found  # with tensors that only the files themselves name, as transformers does

    def _names(self, path: Path) -> Iterable[str]:
        is_safe = path.suffix == ".safetensors"
        return self._safe(path).entries if is_safe else self._pickled(path)

    def _is_safe(self, name: str) -> bool:
        return self.files[name].suffix == ".safetensors"

    def _safe(self, path: Path) -> SafetensorsFile:
        if path not in self._headers:
            self._headers[path] = SafetensorsFile(path)
        return self._headers[path]

    def _pickled(self, path: Path) -> Mapping[str, torch.Tensor]:
        """A `.bin` file, mapped and not read; nothing in it is executed."""
        if path not in self._maps:
            try:
                self._maps[path] = torch.load(
                    path, map_location="cpu", weights_only=True, mmap=True
                )
            except Exception as error:  # whatever a damaged or malicious pickle raises
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UserError(f"{path}: cannot be loaded safely ({reason})") from None
            loaded: Any = self._maps[path]
            fault = _pickled_fault(loaded)
            if fault is not None:
                raise UserError(
                    f"{path}: holds more than tensors by name ({fault}); save the model's "
                    "state_dict alone"
                )
        return self._maps[path]


def _pickled_fault(loaded: Any) -> str | None:
    """What a `.bin` file holds besides ordinary tensors by name; None if nothing."""
    if not isinstance(loaded, dict):
        return "no dictionary"
    for name, value in loaded.items():
        if not isinstance(name, str):
            return "a name that is no text"
        fault = tensor_fault(value)
        if fault is not None:
            return f"at {ascii(name)[1:-1][:200]} {fault}"
    return None


def plan_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Groups tensors into files, in order.

    Args:
        sizes: Tensor name to bytes.
        max_shard_bytes: The most bytes of a file; a larger tensor has one of its own.

    Returns:
        Names of each file's tensors.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_shards(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, torch.Tensor]],
    max_shard_bytes: int,
) -> list[Path]:
    """Writes safetensors files, and their index where there are several.

    Args:
        folder: An existing folder.
        shapes: Name and shape of every tensor, in the order in which `tensors` gives them.
        dtype: Of all.
        tensors: Names and tensors; a generator keeps one in memory at a time.
        max_shard_bytes: The most bytes of a file.

    Returns:
        The files.

    Raises:
        OSError: The disk is full or not writable.
    """
    item = torch.empty(0, dtype=dtype).element_size()
    sizes = {name: item * _num_values(shape) for name, shape in shapes.items()}
    shards = plan_shards(sizes, max_shard_bytes)
    names = [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) > 1
        else "model.safetensors"
        for i in range(len(shards))
    ]
    stream = iter(tensors)
    for file_name, shard in zip(names, shards, strict=True):
        with open(folder / file_name, "wb") as file:
            file.write(_header({name: shapes[name] for name in shard}, sizes, dtype))
            for expected in shard:
                name, tensor = next(stream)
                assert name == expected, f"{name} came where {expected} was planned"
                tensor = tensor.to(dtype).contiguous()
                assert tuple(tensor.shape) == shapes[name], f"{name} has another shape"
                file.write(tensor.view(torch.uint8).flatten().numpy().data)
    if len(shards) > 1:
        weight_map = {
            name: file_name
            for file_name, shard in zip(names, shards, strict=True)
            for name in shard
        }
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )
    return [folder / name for name in names]


def _num_values(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def _header(
    shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int], dtype: torch.dtype
) -> bytes:
    """The header of a safetensors file: where each tensor's values lie behind it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape in shapes.items():
        entries[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, begin + sizes[name]],
        }
        begin += sizes[name]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers expect values to begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text
