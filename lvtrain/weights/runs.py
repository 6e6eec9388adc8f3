"""The weights of a run or a checkpoint of ours, or of a safetensors file, by the evaluated network's own names."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from lvtrain.checkpoint.reader import Weights, open_shapes, open_weights
from lvtrain.errors import UserError
from lvtrain.weights.reading import read_weights

_T = TypeVar("_T")
_TEACHER = "teacher.backbone."


def read_initial(path: Path) -> tuple[Weights | None, dict[str, torch.Tensor]]:
    """A checkpoint (ours) and its evaluated module's weights, or just weights from a safetensors file or folder, or an ONNX file."""
    if path.suffix == ".onnx":
        return None, _onnx(path)
    if (file := weights_file(path)) is not None:
        return None, load_file(file)
    source = open_weights(path)
    return source, evaluated_weights(source)


def shapes_of(path: Path) -> tuple[dict[str, torch.Size], torch.Size | None]:
    """The shapes of `read_initial`'s weights, without reading them, and of the class rows, if there are any."""
    if path.suffix == ".onnx":
        return {name: tensor.shape for name, tensor in _onnx(path).items()}, None
    if (file := weights_file(path)) is not None:
        with safe_open(file, "pt") as stored:
            names: list[str] = stored.keys()
            return {name: torch.Size(stored.get_slice(name).get_shape()) for name in names}, None
    every = open_shapes(path)
    backbone = {
        name.removeprefix(kind): shape
        for kind in ("backbone.param.", "backbone.buffer.")
        for name, shape in every.items()
        if name.startswith(kind)
    }
    return _evaluated(backbone, every), every.get("classifier.weight")


def _onnx(path: Path) -> dict[str, torch.Tensor]:
    try:
        return read_weights(path).backbone
    except UserError as error:
        raise UserError(f"init_from.path: {error}") from error


def weights_file(path: Path) -> Path | None:
    """The safetensors file that `path` is or holds, its header read; None for a folder without, which is a run or a checkpoint, and for an ONNX
    file.

    Raises:
        UserError: another kind of file, or one that is cut short.
    """
    if path.suffix == ".onnx" or (path.is_dir() and not (path / "model.safetensors").exists()):
        return None
    file = path / "model.safetensors" if path.is_dir() else path
    if file.suffix != ".safetensors":
        raise UserError(
            f"init_from.path: {file} is not a run, a checkpoint or a safetensors file; tools/convert_checkpoint.py import makes one"
        )
    try:
        with safe_open(file, "pt"):
            return file
    except SafetensorError as error:
        raise UserError(f"init_from.path: {file} is not a whole safetensors file ({error}); copy it again") from error


def evaluated_weights(source: Weights) -> dict[str, torch.Tensor]:
    """The backbone's weights: of a self-supervised run the teacher's (the better of the two), else the trained module's."""
    names = [name for name in sorted(source.reader.names) if name.startswith(_TEACHER)]
    return _evaluated(source.backbone, {name: source.reader.replicated(name) for name in names})


def _evaluated(backbone: dict[str, _T], everything: dict[str, _T]) -> dict[str, _T]:
    """By the evaluated module's own names: a self-supervised run's teacher, else the trained module, which may hold it as `backbone`."""
    if teacher := {
        name.removeprefix(_TEACHER): value for name, value in everything.items() if name.startswith(_TEACHER)
    }:
        return teacher
    if backbone and all(name.startswith("backbone.") for name in backbone):
        return {name.removeprefix("backbone."): value for name, value in backbone.items()}
    return backbone
