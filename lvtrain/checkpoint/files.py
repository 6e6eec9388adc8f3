"""A checkpoint folder on disk: tensor files that are hashed while they are written, and the manifest that lists them.

    checkpoints/step_000012000/
        manifest.json           step, samples seen, phase, run; size and sha256 of every other file; where each tensor lies
        state.json              the trainer's other numbers
        rank_00000.safetensors  what rank 0 wrote; and so on

The manifest holds the sha256 of its own content, so a flipped byte anywhere is found. The tensor files are plain
safetensors. They are written here, because the library cannot hash while it writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lvtrain.files.patience import patiently

FORMAT = "lvtrain-checkpoint"
VERSION = 2  # 1: state.json repeated step, samples_seen and phase
MANIFEST, STATE = "manifest.json", "state.json"
WRITING, TRASH, DAMAGED = ".writing_", ".trash_", "damaged_"
_NAME = re.compile(r"step_(\d{9,})")
_CHUNK = 16 << 20
_GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # a disk that fails for a moment raises others
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPE_NAMES = _DTYPES
DTYPES = {name: dtype for dtype, name in _DTYPES.items()}


class Damage(Exception):
    """A checkpoint folder differs from its manifest: a file is missing, or has another size or hash.

    Nothing else counts as damage.
    """


@dataclass(frozen=True)
class FileRecord:
    """A finished file: its name within the folder, size in bytes, sha256."""

    name: str
    size: int
    sha256: str


def folder_name(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step_{step:09d}"


def step_of(folder: Path) -> int | None:
    """The step that a folder's name gives; None if it is not named like a checkpoint."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def write_tensors(
    path: Path,
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str],
    *,
    progress: Callable[[], object] = lambda: None,
) -> FileRecord:
    """Writes host tensors as one safetensors file and flushes it to disk.

    Args:
        path: must not exist.
        tensors: by name, on the host.
        metadata: texts for the file's header.
        progress: called after every chunk.

    Raises:
        OSError: the disk is full or read-only, or fails otherwise.
    """
    # widest elements first: every tensor is then aligned to its own element
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    size = 0
    with open(path, "xb") as file:

        def put(data: bytes | memoryview) -> None:
            nonlocal size
            file.write(data)
            digest.update(data)
            size += len(data)

        put(len(text).to_bytes(8, "little") + text)
        progress()
        for _, tensor in ordered:
            data = _bytes(tensor)
            for start in range(0, len(data), _CHUNK):
                put(data[start : start + _CHUNK])
                progress()
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(path.name, size, digest.hexdigest())


def _bytes(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def write_text(path: Path, text: str, *, middle: Callable[[], object] = lambda: None) -> FileRecord:
    """Writes a small file and flushes it to disk. `middle` is called when half of it is written."""
    data = text.encode()
    with open(path, "xb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        middle()
        file.write(data[len(data) // 2 :])
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(path.name, len(data), hashlib.sha256(data).hexdigest())


def manifest_text(content: dict[str, Any]) -> str:
    """The text of a manifest: its content and the sha256 of that."""
    return json.dumps({"sha256": _digest(content), "content": content}, indent=1)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest's content, after every check that does not read whole files.

    Raises:
        Damage: the manifest is missing, altered or of another step; a file is missing or has another size.
        OSError: the file system kept failing. The checkpoint may be intact.
    """
    try:
        manifest = json.loads(patiently((folder / MANIFEST).read_bytes))
        content = manifest["content"]
        if manifest["sha256"] != _digest(content):
            raise Damage("the manifest was altered")
    except _GONE as error:
        raise Damage("the manifest is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Damage(f"the manifest cannot be read ({type(error).__name__})") from error
    if content["format"] != FORMAT or content["step"] != step_of(folder):
        raise Damage("the manifest belongs to another folder")
    for name, entry in content["files"].items():
        try:
            size = patiently((folder / name).stat).st_size
        except _GONE as error:
            raise Damage(f"{name} is missing") from error
        if size != entry["size"]:
            raise Damage(f"{name} has {size} bytes instead of {entry['size']}")
    return content


def check_file(folder: Path, name: str, sha256: str) -> str | None:
    """Hashes a file. Returns what is wrong with it, or None.

    Raises:
        OSError: the file system kept failing. The file may be intact.
    """

    def read() -> str:
        digest = hashlib.sha256()
        with open(folder / name, "rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    try:
        return None if patiently(read) == sha256 else f"{name} was altered (sha256 differs)"
    except _GONE:
        return f"{name} is missing"


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
