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
from lvtrain.files.reading import parse_json

FORMAT = "lvtrain-checkpoint"
VERSION = 2  # 1: state.json repeated step, samples_seen and phase
MANIFEST, STATE = "manifest.json", "state.json"
WRITING, TRASH, DAMAGED = ".writing_", ".trash_", "damaged_"
_NAME = re.compile(r"step_(\d{9,})")
_SHARD = re.compile(r"rank_(\d+)\.safetensors")
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_CONTENT = {"run_id": str, "fingerprint": str, "samples_seen": int, "phase": str, "keep": bool} | {
    "tensors": dict,
    "files": dict,
    "version": int,
}
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
    """A checkpoint folder differs from its manifest: a file is missing, of another size, hash or writer.

    A manifest that contradicts itself is damage, too. Nothing else is: an error of the file system may pass.
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
        Damage: the manifest is missing, altered, of another step or contradicts itself; a file is missing or has another
            size.
        OSError: the file system kept failing. The checkpoint may be intact.
    """
    try:
        manifest = parse_json(patiently((folder / MANIFEST).read_bytes))
        content = manifest["content"]
        if manifest["sha256"] != _digest(content):
            raise Damage("the manifest was altered")
    except _GONE as error:
        raise Damage("the manifest is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Damage(f"the manifest cannot be read ({type(error).__name__})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("step") != step_of(folder):
        raise Damage("the manifest belongs to another folder")
    if isinstance(content.get("version"), int) and content["version"] > VERSION:
        return content  # its reader says so
    try:
        _check_content(content)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise Damage(f"the manifest contradicts itself ({error or type(error).__name__})") from error
    for name, entry in content["files"].items():
        try:
            size = patiently((folder / name).stat).st_size
        except _GONE as error:
            raise Damage(f"{name} is missing") from error
        if size != entry["size"]:
            raise Damage(f"{name} has {size} bytes instead of {entry['size']}")
    return content


def _check_content(content: dict[str, Any]) -> None:
    """Checks that a manifest names files of its own folder only, and every row of every tensor once.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: it does not.
    """
    for key, kind in _CONTENT.items():
        if type(content[key]) is not kind:
            raise TypeError(f"{key} is {type(content[key]).__name__}")
    for name, entry in content["files"].items():
        if not _PLAIN.fullmatch(name) or type(entry["size"]) is not int or type(entry["sha256"]) is not str:
            raise ValueError(f"the file {name!r}")
    if STATE not in content["files"]:
        raise ValueError(f"no {STATE}")
    for name, entry in content["tensors"].items():
        shape = entry["shape"]
        pieces = entry["pieces"] if "pieces" in entry else [{"file": entry["file"]}]
        if entry["dtype"] not in DTYPES or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"shape or type of {name}")
        if not {piece["file"] for piece in pieces} <= content["files"].keys():
            raise ValueError(f"{name} lies in a file that it does not list")
        starts, stops = [[piece[edge] for piece in pieces if edge in piece] for edge in ("start", "stop")]
        if "pieces" in entry and [*starts, shape[0]] != [0, *stops]:
            raise ValueError(f"the rows of {name} are not there once")


def check_file(folder: Path, name: str, content: dict[str, Any]) -> str | None:
    """Hashes a file, and reads what a tensor file says of itself. Returns what is wrong with it, or None.

    Args:
        folder: of the checkpoint.
        name: of the file.
        content: of the manifest.

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
        if patiently(read) != content["files"][name]["sha256"]:
            return f"{name} was altered (sha256 differs)"
        if not (rank := _SHARD.fullmatch(name)):
            return None
        own = patiently(_metadata, folder / name)
    except _GONE:
        return f"{name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{name} is not a tensor file"
    wanted = {"run_id": content["run_id"], "step": str(content["step"]), "rank": str(int(rank[1]))}
    return None if own == wanted else f"{name} was written by another run, step or rank"


def _metadata(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says of its writer."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("the header is longer than the file")
        return dict(parse_json(file.read(length))["__metadata__"])


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
