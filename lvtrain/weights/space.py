"""The embedding space that weights span: embeddings may be compared only within one space.

Its identifier is 16 hexadecimal digits of a SHA-256 over the weights that give the embedding. A run, its checkpoint, the
folder, the `.pt` and the float32 ONNX file exported from it have the same one. A float16 or int8 file moves embeddings, so
it has another space, named after the one it derives from: `0123456789abcdef+int8-89ab`.

A file that was changed after its identifier was written does not keep it: the identifier is kept beside a digest of what
it was written for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lvtrain.errors import UserError
from lvtrain.files.reading import parse_json
from lvtrain.weights.onnx.file import recogniser
from lvtrain.weights.onnx.match import read_onnx
from lvtrain.weights.source import CONFIG, open_source

SPACE, TENSORS = "lvtrain.space", "lvtrain.tensors"  # keys of an ONNX file's metadata


def space_of(path: str | Path, *, average: bool = False) -> str:
    """The identifier of the weights at `path`, which may be anything that `load_model` opens.

    Args:
        path: the file or folder.
        average: take a run's moving average of the weights.

    Raises:
        UserError: nothing usable there.
    """
    path = recogniser(Path(path))
    if path.suffix == ".onnx":
        return _onnx_space(path)
    return space_at(path, open_source(path, average=average).state())


def space_at(path: Path, state: Mapping[str, torch.Tensor]) -> str:
    """The identifier of the weights `state` that were read from `path`."""
    if path.suffix == ".onnx":
        return _onnx_space(path)
    computed = space_of_state(state)
    kept = _kept(path)
    return str(kept["space"]) if kept.get("space") and kept.get("weights") == computed else computed


def space_of_state(state: Mapping[str, torch.Tensor]) -> str:
    """16 hexadecimal digits of `digest_of`.

    Args:
        state: of the network that gives the embedding, float32, by its own names.
    """
    return digest_of(state).hex()[:16]


def digest_of(state: Mapping[str, torch.Tensor]) -> bytes:
    """SHA-256 of names, shapes and values of the floating-point tensors.

    A run's checkpoint and what was exported from it have the same one.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        if (tensor := state[name]).is_floating_point():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.digest()


def narrowed(space: str, precision: str, graph: Any) -> str:
    """The identifier of a file of another `precision` that was made from `space`; `graph` is its ONNX graph."""
    return f"{space}+{precision}-{graph_digest(graph)[:4]}"


def explain(first: str, second: str) -> str:
    """Why embeddings of two different spaces cannot be compared, as the rest of a sentence."""
    if first.partition("+")[0] == second.partition("+")[0]:
        return f"{first} and {second} come from the same weights, but another precision moves the embeddings"
    return f"{first} and {second} are spaces of different weights"


def graph_digest(graph: Any) -> str:
    """SHA-256 of what an ONNX graph computes: its constants and nodes."""
    digest = hashlib.sha256()
    for part in (*graph.initializer, *graph.node):
        digest.update(part.SerializeToString(deterministic=True))
    return digest.hexdigest()


def read_metadata(path: Path) -> tuple[dict[str, str], Any]:
    """Metadata of an ONNX file by key, and its graph. Keys of ours are left out where the graph was changed since.

    Raises:
        UserError: not an ONNX file.
    """
    import onnx

    try:
        model = onnx.load(str(path))
    except Exception as error:
        raise UserError(f"{path} is not an ONNX file ({type(error).__name__})") from error
    found = {entry.key: entry.value for entry in model.metadata_props}
    if found.get(TENSORS) != graph_digest(model.graph):
        found.pop(SPACE, None)
    return found, model.graph


def _onnx_space(path: Path) -> str:
    metadata, graph = read_metadata(path)
    if SPACE in metadata:
        return metadata[SPACE]
    try:
        return space_of_state(read_onnx(path).state)  # as the folder that it is imported to
    except UserError:  # not a network that we know
        return graph_digest(graph)[:16]


def _kept(path: Path) -> dict[str, Any]:
    """`space` and the digest of the `weights` it was written for, of a folder that lvtrain exported; otherwise empty."""
    config = path / CONFIG
    try:
        section = parse_json(config.read_text())["lvtrain"] if path.is_dir() and config.is_file() else {}
        return {"space": section.get("card", {}).get("space"), "weights": section.get("weights")}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
