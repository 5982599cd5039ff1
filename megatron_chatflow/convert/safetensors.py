"""Reads Hugging Face weight files tensor by tensor, and writes safetensors files in the same way.

Reading supports a folder with safetensors shards, one safetensors file, or `.bin` files. The
safetensors library reads tensors and slices of them from a mapped file. The header is validated
here first, so that a damaged file is refused with a message that names the tensor. Writing is also
done here, because the library's writer takes all tensors of a file at once, while conversion holds
one in memory. The format is documented at https://github.com/huggingface/safetensors
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_chatflow.checkpoint.reader import first_line, tensor_fault
from megatron_chatflow.errors import UserError

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


# Headers are a few hundred bytes a tensor; the format allows 100 MB.
_MAX_HEADER_BYTES = 100_000_000


class SafetensorsFile:
    """One safetensors file; ``entries`` holds the header's entries by tensor name."""

    entries: dict[str, dict[str, Any]]

    def __init__(self, path: Path) -> None:
        """Reads and validates the header."""
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
                f"{path}: is damaged or not a safetensors file (cannot read its header); "
                "download it again"
            ) from None
        entries: dict[str, Any] = header if isinstance(header, dict) else {"": None}
        metadata = entries.get("__metadata__")
        if metadata is not None and not (
            isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())
        ):
            raise UserError(
                f"{path}: is damaged at __metadata__ (not an object of strings); download it again"
            )
        self.entries = {name: entries[name] for name in entries if name != "__metadata__"}
        for name, entry in self.entries.items():
            fault = _fault(entry, num_bytes)
            if fault is not None:
                raise UserError(
                    f"{path}: is damaged at {name or 'its header'} ({fault}); download it again"
                )
        place = _misplaced(self.entries, num_bytes)
        if place is not None:
            raise UserError(
                f"{path}: is damaged at {place} (values overlap or belong to no tensor); "
                "download it again"
            )

    def read(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> torch.Tensor:
        """Reads a tensor of one or two axes and a known dtype, or some of its rows and columns."""
        try:
            with safe_open(self.path, framework="pt") as file:
                part = file.get_slice(name)
                is_vector = len(self.entries[name]["shape"]) == 1
                tensor: torch.Tensor = part[rows] if is_vector else part[rows, columns]
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self.path}: is damaged at {name} ({first_line(error)}); download it again"
            ) from None
        return tensor


def _fault(entry: Any, num_bytes: int) -> str | None:
    """Returns why a header's entry is invalid; None if it is valid."""
    keys = ("dtype", "shape", "data_offsets")
    if not isinstance(entry, dict) or any(key not in entry for key in keys):
        return "not the entry of a tensor"
    dtype, shape, offsets = (entry[key] for key in keys)
    if not (isinstance(dtype, str) and _are_counts(shape) and _are_counts(offsets)):
        return "not the entry of a tensor"
    if len(offsets) != 2 or not offsets[0] <= offsets[1] <= num_bytes:
        return "its values lie outside the file"
    known = _TORCH_DTYPES.get(dtype)
    if known and offsets[1] - offsets[0] != math.prod(shape) * known.itemsize:
        return "the shape does not match the number of bytes"
    return None


def _misplaced(entries: Mapping[str, Mapping[str, Any]], num_bytes: int) -> str | None:
    """Returns the first tensor whose values do not follow those of the one before; None if all do.

    The format requires every byte after the header to belong to exactly one tensor.
    """
    end = 0
    for name in sorted(entries, key=lambda name: entries[name]["data_offsets"]):
        begin, next_begin = entries[name]["data_offsets"]
        if begin != end:
            return name
        end = next_begin
    return None if end == num_bytes else "its end"


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds an object of a JSON file, in which no key may occur twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate name")
    return found


def _are_counts(values: Any) -> bool:
    """Returns whether a value is a list of non-negative integers."""
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


class HuggingFaceWeights:
    """The tensors of a Hugging Face folder; ``files`` holds the file of each tensor by name."""

    def __init__(self, folder: Path) -> None:
        """Opens a folder.

        Raises:
            UserError: The folder has no weights, or its index names missing files.
        """
        self.folder = folder
        self._headers: dict[Path, SafetensorsFile] = {}
        self._maps: dict[Path, Mapping[str, torch.Tensor]] = {}
        self.files = self._find_files()

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape."""
        if self._is_safe(name):
            return tuple(self._safe(self.files[name]).entries[name]["shape"])
        return tuple(self._pickled(self.files[name])[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Returns a tensor's dtype, which must be fp32, bf16 or fp16."""
        path = self.files[name]
        if self._is_safe(name):
            dtype = _TORCH_DTYPES.get(self._safe(path).entries[name]["dtype"])
        else:
            dtype = self._pickled(path)[name].dtype
        if dtype not in _DTYPE_NAMES:
            raise UserError(
                f"{path}: {name} is not fp32, bf16 or fp16; use a model that is not quantized"
            )
        return dtype

    def read(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> torch.Tensor:
        """Reads a tensor, or some of its rows and columns."""
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
                        f"{self.folder}: contains two models, {single.name} and the files in "
                        f"{index.name}; remove one of them"
                    )
                return files
            if single.is_file():
                return dict.fromkeys(self._names(single), single)
        raise UserError(
            f"{self.folder}: has no model.safetensors, no pytorch_model.bin and no index of "
            "shards; give a Hugging Face model folder"
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
            raise UserError(f"{index}: is damaged; download it again") from None
        found: dict[str, Path] = {}
        for path in sorted(set(files.values())):
            if path.parent != self.folder or path.name not in listed:
                shown = repr(str(path))[1:-1]  # the name may contain anything
                raise UserError(
                    f"{shown}: is missing, but listed in {index.name}; download it again"
                )
            held = set(self._names(path))
            lost = [name for name, file in files.items() if file == path and name not in held]
            if lost:
                raise UserError(
                    f"{path}: does not contain {lost[0]}, which {index.name} lists in this file; "
                    "download the folder again"
                )
            twice = next((name for name in sorted(held) if name in found), None)
            if twice is not None:
                raise UserError(
                    f"{path}: contains {ascii(twice)[1:-1]}, which {found[twice].name} contains "
                    "as well; download the folder again"
                )
            found |= dict.fromkeys(held, path)
        return found  # including tensors that the index does not name, as in transformers

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
        """Maps a `.bin` file without reading it; nothing in it is executed."""
        if path not in self._maps:
            try:
                self._maps[path] = torch.load(
                    path, map_location="cpu", weights_only=True, mmap=True
                )
            except Exception as error:  # a damaged or malicious pickle may raise anything
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UserError(
                    f"{path}: cannot be loaded safely ({reason}); save the model as safetensors"
                ) from None
            loaded: Any = self._maps[path]
            fault = _pickled_fault(loaded)
            if fault is not None:
                raise UserError(
                    f"{path}: is not a dictionary of tensors ({fault}); save only the state_dict "
                    "of the model"
                )
        return self._maps[path]


def _pickled_fault(loaded: Any) -> str | None:
    """Returns why a `.bin` file is not a dictionary of ordinary tensors; None if it is."""
    if not isinstance(loaded, dict):
        return "not a dictionary"
    for name, value in loaded.items():
        if not isinstance(name, str):
            return "a name is not a string"
        fault = tensor_fault(value)
        if fault is not None:
            return f"at {ascii(name)[1:-1][:200]}: {fault}"
    return None


def plan_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Groups tensors into files, in order; a tensor above ``max_shard_bytes`` gets its own file."""
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
    """Writes safetensors files, and an index if there are several.

    Args:
        folder: An existing folder.
        shapes: Name and shape of every tensor, in the order in which `tensors` gives them.
        dtype: The dtype of all tensors.
        tensors: Names and tensors; a generator keeps one in memory at a time.
        max_shard_bytes: The largest size of a file in bytes.

    Returns:
        The files.
    """
    sizes = {name: dtype.itemsize * math.prod(shape) for name, shape in shapes.items()}
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
                assert name == expected, f"got {name}, expected {expected}"
                tensor = tensor.to(dtype).contiguous()
                assert tuple(tensor.shape) == shapes[name], f"{name} has an unexpected shape"
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


def _header(
    shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int], dtype: torch.dtype
) -> bytes:
    """Returns the header of a safetensors file."""
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
    text += b" " * (-len(text) % 8)  # values should begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text
