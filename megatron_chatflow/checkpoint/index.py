"""The index of a distributed checkpoint, which says where each chunk of each tensor is stored.

Two files hold it. `.metadata` is torch's pickle, which every checkpoint has and which torch,
megatron-core and earlier versions read. `tensor_index.json` has the same content; checkpoints of
this version have both files, and `read_index` then reads only the JSON and unpickles nothing. The
JSON records the hash of `.metadata`: if another program has rewritten `.metadata`, both files are
refused. Checkpoints of other programs and earlier versions have only `.metadata`. It is unpickled
into stand-in classes of this module, so that a pickle cannot call or change anything else.

For both files, the chunks of a tensor must cover it exactly, and every chunk must have a record of
sufficient length in a file of the folder.

A layer's norms have the names that Megatron-LM gives them in transformer-engine's layers, where a
norm is a part of the linear layer behind it. `read_index` renames those of checkpoints that earlier
versions wrote, both weights and optimizer state.
"""

import hashlib
import io
import json
import math
import pickle
import pickletools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_chatflow.errors import UserError

METADATA = ".metadata"
TENSOR_INDEX = "tensor_index.json"

_MAX_NESTED = 20  # torch's own: 2
_scanned: set[bytes] = set()  # SHA-256 of pickles that `_check_opcodes` has passed
_MAX_CUT_AXES = 6  # the cost of the coverage check doubles with each
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}

# Ends of names in checkpoints of earlier versions, and what they are called now.
_RENAMED = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}

From = TypeVar("From")
To = TypeVar("To")
Box = tuple[Sequence[int], Sequence[int]]
"""The offsets of a chunk in its tensor, and its shape."""
Place = tuple[str, int, int]
"""A file's name, and the offset and length of a record in it, in bytes."""


def coverage_fault(size: Sequence[int], boxes: Iterable[Box]) -> str | None:
    """Returns why the chunks of a tensor do not cover it exactly; None if they do.

    Comparing all pairs of chunks would take minutes for the index of a large job. Instead, every
    chunk adds +1 or -1 at each of its corners, with opposite signs at neighbouring corners. The
    sums are the mixed difference of the function that counts the chunks that hold an element, and
    determine it: the chunks cover the tensor exactly if and only if the sums equal the tensor's own
    corners. This takes 2^a dictionary updates for each of n chunks, where a is the number of axes
    along which the tensor is split, usually 1 or 2. Empty chunks are ignored.
    """
    held = 0
    filled: list[Box] = []
    for offsets, sizes in boxes:
        if not len(offsets) == len(sizes) == len(size):
            return "has a chunk with a different number of dimensions"
        for offset, length, limit in zip(offsets, sizes, size, strict=True):
            if offset < 0 or length < 0 or offset + length > limit:
                return "has a chunk outside its shape"
        num_values = math.prod(sizes)
        if num_values:
            held += num_values
            filled.append((offsets, sizes))
    num_values = math.prod(size)
    if held != num_values:
        return f"has {num_values} values, but its chunks contain {held}"
    if len(filled) <= 1:
        return None
    cut = [a for a, limit in enumerate(size) if any(sizes[a] != limit for _, sizes in filled)]
    if len(cut) > _MAX_CUT_AXES:
        return f"is split along more than {_MAX_CUT_AXES} dimensions"
    # A corner is numbered like an element of a tensor that is longer by one along each axis.
    strides: list[tuple[int, int]] = []
    stride = 1
    for axis in cut:
        strides.append((axis, stride))
        stride *= size[axis] + 1
    sums: dict[int, int] = {}
    for offsets, sizes in [([0] * len(size), size), *filled]:
        corners = [(sum(offsets[axis] * stride for axis, stride in strides), 1)]
        for axis, stride in strides:
            step = sizes[axis] * stride
            corners += [(number + step, -sign) for number, sign in corners]
        for number, sign in corners:
            sums[number] = sums.get(number, 0) + sign
    # The tensor's own corners were added first, so that the sums have to be twice those.
    whole = [(0, 1)]
    for axis, stride in strides:
        whole += [(number + size[axis] * stride, -sign) for number, sign in whole]
    for number, sign in whole:
        sums[number] -= 2 * sign
    return "has overlapping and missing chunks" if any(sums.values()) else None


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True)


_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Counts = list[_Count]


class _TensorEntry(_Entry):
    """A tensor: for each chunk its offsets, sizes, number of its file, offset and length there."""

    dtype: str
    shape: _Counts
    chunks: list[tuple[_Counts, _Counts, _Count, _Count, _Count]]


class _IndexFile(_Entry):
    """The content of `tensor_index.json`."""

    version: Literal[1]
    metadata_sha256: str
    files: list[str]
    tensors: dict[str, _TensorEntry]
    objects: dict[str, tuple[_Count, _Count, _Count]]


def index_json(index: Metadata, metadata: bytes) -> bytes:
    """Returns the content of `tensor_index.json`, which records the hash of ``metadata``."""
    numbers: dict[str, int] = {}

    def place(name: str, offsets: torch.Size | None) -> list[int]:
        stored = index.storage_data[MetadataIndex(name, offsets)]
        number = numbers.setdefault(stored.relative_path, len(numbers))
        return [number, stored.offset, stored.length]

    tensors, objects = {}, {}
    for name, entry in index.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            tensors[name] = {
                "dtype": str(entry.properties.dtype).removeprefix("torch."),
                "shape": list(entry.size),
                "chunks": [
                    [list(c.offsets), list(c.sizes), *place(name, c.offsets)] for c in entry.chunks
                ],
            }
        else:
            objects[name] = place(name, None)
    content = {
        "version": 1,
        "metadata_sha256": hashlib.sha256(metadata).hexdigest(),
        "files": list(numbers),
        "tensors": tensors,
        "objects": objects,
    }
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"


def read_index(folder: Path) -> Metadata:
    """Reads and checks the index of an ``iter_`` folder.

    Raises:
        UserError: The index is missing or damaged, its two files do not belong together, or chunks
            of a tensor overlap or are missing.
    """
    path = folder / METADATA
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{folder}: contains no distributed checkpoint (no .metadata)") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        text = (folder / TENSOR_INDEX).read_bytes()
    except FileNotFoundError:
        return _read(path, _unpickled, content)
    except OSError as error:
        raise UserError(f"{folder / TENSOR_INDEX}: cannot be read ({error.strerror})") from None
    file = _read(folder / TENSOR_INDEX, _IndexFile.model_validate_json, text)
    if file.metadata_sha256 != hashlib.sha256(content).hexdigest():
        raise UserError(
            f"{folder}: .metadata was changed after {TENSOR_INDEX} was written; load another "
            f"checkpoint or, if a trusted program changed it, delete {TENSOR_INDEX}"
        )
    return _read(folder / TENSOR_INDEX, _index_of_json, file)


def _read(path: Path, parse: Callable[[From], To], content: From) -> To:
    """Calls a parser and turns its failure into a `UserError` with the first line of the reason."""
    try:
        return parse(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ascii(".".join(map(str, first["loc"])))[1:-1][:200]
        reason = f"{where}: {first['msg']}".removeprefix(": ")
    except Exception as error:  # a damaged pickle may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    raise UserError(f"{path}: is damaged ({reason}); use another checkpoint")


def _index_of_json(file: _IndexFile) -> Metadata:
    def place(number: int, offset: int, length: int) -> Place:
        if number >= len(file.files):
            raise ValueError(f"file number {number} does not exist")
        return file.files[number], offset, length

    tensors = {}
    for name, entry in file.tensors.items():
        chunks = [(tuple(c[0]), tuple(c[1]), place(*c[2:])) for c in entry.chunks]
        tensors[name] = (entry.dtype, tuple(entry.shape), chunks)
    return _checked(tensors, {name: place(*where) for name, where in file.objects.items()})


def _checked(
    tensors: Mapping[str, tuple[Any, Any, Sequence[tuple[Any, Any, Place | None]]]],
    objects: Mapping[str, Place | None],
) -> Metadata:
    """Builds torch's index from entries whose numbers are known to be non-negative integers."""
    for file in {place[0] for _, _, chunks in tensors.values() for *_, place in chunks if place}:
        _check_file(file)
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for stored_name, (dtype_name, size, chunks) in tensors.items():
        name = current_name(stored_name)
        if name in entries:
            raise ValueError(f"{name} is stored twice, also as {stored_name}")
        dtype = _DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
        if dtype is None:
            raise ValueError(f"{name} has an unsupported dtype")
        fault = coverage_fault(size, [(offsets, sizes) for offsets, sizes, _ in chunks])
        if fault is not None:
            raise ValueError(f"{name} {fault}")
        kept: list[ChunkStorageMetadata] = []
        for offsets, sizes, place in chunks:
            num_bytes = math.prod(sizes) * dtype.itemsize
            if num_bytes == 0:
                continue
            if place is None:
                raise ValueError(f"a chunk of {name} has no storage location")
            if place[2] < num_bytes:
                raise ValueError(f"{name} has a chunk that is larger than its stored record")
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            places[MetadataIndex(name, chunk.offsets, len(kept))] = _StorageInfo(*place)
            kept.append(chunk)
        entries[name] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(size), kept)
    for name, place in objects.items():
        if place is None:
            raise ValueError(f"{name} has no storage location")
        _check_file(place[0])
        entries[name] = BytesStorageMetadata()
        places[MetadataIndex(name)] = _StorageInfo(*place)
    return Metadata(state_dict_metadata=entries, storage_data=places)


def current_name(name: str) -> str:
    """Returns the name that this version gives to a tensor of an earlier version's checkpoint."""
    for end, renamed in _RENAMED.items():
        if name.endswith(end):
            return name.removesuffix(end) + renamed
    return name


def _check_file(file: str) -> None:
    if Path(file).name != file or file in ("", "..") or "\0" in file:
        raise ValueError(f"{file[:80]!r} is not a file name within the folder")


class _StandIn:
    """Stands for an instance of a class that an index names, and keeps only its state.

    It has no ``__dict__``, and pickle's BUILD calls ``__setstate__``: of an instance it works once,
    and of the class itself it lacks an argument.
    """

    __slots__ = ("state",)

    state: Any

    def __new__(cls) -> "_StandIn":
        made = super().__new__(cls)
        made.state = None
        return made

    def __setstate__(self, state: Any) -> None:
        if self.state is not None or type(state) not in (dict, tuple):
            raise pickle.UnpicklingError("an entry has no state or more than one")
        self.state = state

    def get(self, name: str) -> Any:
        """A value of the state; None where there is none."""
        return self.state.get(name) if isinstance(self.state, dict) else None


def _stand_in(name: str) -> type[_StandIn]:
    return type(name, (_StandIn,), {"__slots__": ()})


_Index, _Tensor, _Object, _Chunk = map(_stand_in, ("Index", "Tensor", "Object", "Chunk"))
_Properties, _Stored, _Other = map(_stand_in, ("Properties", "Stored", "Other"))


class _Key(_StandIn):
    """A `MetadataIndex`, which is a key of a dictionary and therefore stays as it is."""

    __slots__ = ("key",)

    key: tuple[str, tuple[int, ...] | None]

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        name, offset = self.get("fqn"), self.get("offset")
        if type(name) is not str or not (offset is None or _are_counts(offset)):
            raise pickle.UnpicklingError("a place has no name")
        self.key = (name, offset)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.key == other.key


class _Function:
    """Stands for a function or constant; it has no attributes that BUILD could set."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function cannot have a state")

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)


def _size(values: Any = ()) -> tuple[int, ...]:
    counts = tuple(values) if type(values) in (list, tuple) else (None,)
    if not _are_counts(counts):
        raise pickle.UnpicklingError("a size is not a tuple of non-negative integers")
    return counts


def _path(*parts: Any) -> str:
    if not all(type(part) is str for part in parts):
        raise pickle.UnpicklingError("a path is not made of strings")
    return "/".join(parts)


def _getattr(owner: Any, name: Any) -> None:
    """Stands for ``getattr``, with which Python 3.11.0 to 3.11.3 pickle members of an enum."""
    names = ("TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT")
    if owner is not _MEMORY_FORMATS or name not in names:
        raise pickle.UnpicklingError("builtins.getattr is not allowed in an index")


def _are_counts(values: Any) -> bool:
    """Returns whether a value is a tuple of non-negative integers."""
    return type(values) is tuple and all(type(v) is int and 0 <= v < 2**63 for v in values)


_NOTHING = _Function(lambda *_: None)  # a value that is not needed
_MEMORY_FORMATS = _Function(lambda *_: None)
_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_STORAGE_MODULE = "torch.distributed.checkpoint.filesystem"
_STAND_INS: dict[tuple[str, str], Any] = {
    (_METADATA_MODULE, "Metadata"): _Index,
    (_METADATA_MODULE, "TensorStorageMetadata"): _Tensor,
    (_METADATA_MODULE, "BytesStorageMetadata"): _Object,
    (_METADATA_MODULE, "ChunkStorageMetadata"): _Chunk,
    (_METADATA_MODULE, "TensorProperties"): _Properties,
    (_METADATA_MODULE, "MetadataIndex"): _Key,
    (_METADATA_MODULE, "StorageMeta"): _Other,
    (_METADATA_MODULE, "_MEM_FORMAT_ENCODING"): _MEMORY_FORMATS,
    (_STORAGE_MODULE, "_StorageInfo"): _Stored,
    ("torch", "Size"): _Function(_size),
    ("torch", "device"): _NOTHING,
    ("torch.serialization", "_get_layout"): _NOTHING,
    ("torch", "strided"): _NOTHING,
    ("torch", "contiguous_format"): _NOTHING,
    ("collections", "OrderedDict"): _Function(lambda: {}),
    ("pathlib", "PosixPath"): _Function(_path),
    ("pathlib._local", "PosixPath"): _Function(_path),
    ("builtins", "getattr"): _Function(_getattr),
    **{("torch", name): name for name in _DTYPES},
}


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles a checkpoint's index into stand-ins and refuses every other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in an index")
        return _STAND_INS[module, name]


def _unpickled(content: bytes) -> Metadata:
    _check_opcodes(content)
    index = _IndexUnpickler(io.BytesIO(content)).load()
    entries = _part(index, _Index, "state_dict_metadata", dict)
    stored = _part(index, _Index, "storage_data", dict)
    places: dict[tuple[str, tuple[int, ...] | None], Place] = {}
    for key, place in stored.items():
        if type(key) is not _Key:
            raise ValueError("a place has no name")
        name = key.key[0]
        file = _part(place, _Stored, "relative_path", str)
        offset: int = _part(place, _Stored, "offset", int)
        length: int = _part(place, _Stored, "length", int)
        if not _are_counts((offset, length)):
            raise ValueError(f"the storage location of {name} is invalid")
        if place.get("transform_descriptors"):
            raise ValueError(f"{name} is compressed, which is not supported")
        places[key.key] = (file, offset, length)
    for file in {place[0] for place in places.values()}:  # also where no entry refers to it
        _check_file(file)
    tensors: dict[str, Any] = {}
    objects: dict[str, Place | None] = {}
    for name, entry in entries.items():
        if type(name) is not str or type(entry) not in (_Tensor, _Object):
            raise ValueError("an entry has an unknown type")
        if type(entry) is _Object:
            objects[name] = places.get((name, None))
            continue
        properties = _part(entry, _Tensor, "properties", _Properties).state
        dtype = properties[0] if type(properties) is tuple and properties else None
        if type(properties) is dict:
            dtype = properties.get("dtype")
        chunks = []
        for chunk in _part(entry, _Tensor, "chunks", list):
            offsets = _part(chunk, _Chunk, "offsets", tuple)
            sizes = _part(chunk, _Chunk, "sizes", tuple)
            if not (_are_counts(offsets) and _are_counts(sizes)):
                raise ValueError(f"{name} has a chunk without a shape")
            chunks.append((offsets, sizes, places.get((name, offsets))))
        size = _part(entry, _Tensor, "size", tuple)
        if not _are_counts(size):
            raise ValueError(f"{name} has no shape")
        tensors[name] = (dtype, size, chunks)
    return _checked(tensors, objects)


def _part(owner: object, kind: type[_StandIn], name: str, expected: type) -> Any:
    """Returns a value of a stand-in's state, which must have the expected class and type."""
    value = owner.get(name) if isinstance(owner, kind) else None
    if type(value) is not expected:
        raise ValueError(f"{name} is missing or has the wrong type")
    return value


def _check_opcodes(content: bytes) -> None:
    """Refuses a pickle that would crash the unpickler and with it this process.

    A large memo index allocates unbounded memory, and a deeply nested tuple used as a dictionary
    key overflows the C stack. Scanning takes a second for each 3 MB, so each content is scanned
    once.
    """
    digest = hashlib.sha256(content).digest()
    if digest in _scanned:
        return
    # How deeply tuples are nested in each value on the unpickler's stack and in its memo.
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name == "MARK":
            marks.append(len(stack))
            continue
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(memo) if argument is None else int(argument)
            if place > len(content):
                raise ValueError("a memo index is too large")
            memo[place] = stack[-1] if stack else 0
            continue
        if name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo.get(int(argument or 0), 0))
            continue
        taken: list[int] = []
        if pickletools.markobject in opcode.stack_before:
            begin = marks.pop() if marks else 0
            taken, stack[begin:] = stack[begin:], []
            num_below = opcode.stack_before.index(pickletools.markobject)
        elif name == "POP" and marks and marks[-1] == len(stack):
            marks.pop()
            continue
        else:
            num_below = len(opcode.stack_before)
        if num_below:
            taken, stack[-num_below:] = stack[-num_below:] + taken, []
        depth = 0
        if name in ("DUP", "BUILD"):
            depth = taken[0] if taken else 0
        elif name.startswith("TUPLE"):
            depth = 1 + max(taken, default=0)
        if depth > _MAX_NESTED:
            raise ValueError("tuples are nested too deeply")
        stack += [depth] * len(opcode.stack_after)
    _scanned.add(digest)
