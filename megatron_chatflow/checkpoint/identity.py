"""Whether two folders hold the same checkpoint, told without reading it all.

In: a checkpoint's folder, ours or Hugging Face's. Out: a text that copies of it share and others do
not. Ours carry their hashes; of other folders, sizes and sampled blocks are hashed.
"""

from hashlib import blake2b
from pathlib import Path

from megatron_chatflow.checkpoint.manifest import MANIFEST, read_manifest
from megatron_chatflow.data.fingerprint import sampled_hash
from megatron_chatflow.errors import UserError

_HUGGINGFACE_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")


def identity(folder: Path, *, is_huggingface: bool = False) -> str:
    """blake2b-128 of what a checkpoint holds, hex.

    Raises:
        UserError: A file is missing or has another size than its manifest says.
    """
    digest = blake2b(digest_size=16)
    if not is_huggingface and (folder / MANIFEST).is_file():
        for name, file in read_manifest(folder).items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != file.num_bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise UserError(f"{path}: {found}, and {MANIFEST} says {file.num_bytes} bytes")
            digest.update(f"{name} {file.num_bytes} {file.digest}\n".encode())
        return digest.hexdigest()
    patterns = _HUGGINGFACE_FILES if is_huggingface else ("*", ".metadata")
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    if not paths:
        raise UserError(f"{folder}: is no folder with a checkpoint")
    for path in sorted(paths):
        digest.update(f"{path.name} {sampled_hash(path)}\n".encode())
    return digest.hexdigest()
