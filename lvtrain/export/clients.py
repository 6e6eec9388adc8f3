"""`check`: would the programs that open face-recognition ONNX files take this one? Each client's rules, and why it would refuse.

The rules are those in the clients' code: insightface's `get_model`, lvface's `LVFaceOnnxEmbedder`, uniface's recogniser base class, and the (now offline)
MFR-Ongoing server's checks in its `onnx_helper.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lvtrain.errors import UserError

# MFR-Ongoing's server is offline (2026); its rules are checked, but are an error only with `--client MFR-Ongoing`
LIVING = ("insightface", "lvface", "uniface")
_MFR_BYTES = 1024 * 1024 * 1024


@dataclass(frozen=True)
class Verdict:
    """Whether a client accepts the file, and the reasons if it does not."""

    client: str
    accepted: bool
    reasons: tuple[str, ...]


@dataclass
class _File:
    """What the rules need to know of a file."""

    path: Path
    model: Any
    size: int
    input_shape: list[int | str]
    output_shape: list[int | str]
    run: Callable[[np.ndarray], np.ndarray]

    @property
    def graph(self) -> Any:
        return self.model.graph


def check(path: str | Path) -> list[Verdict]:
    """Every client's verdict on an ONNX file.

    Raises:
        UserError: not an ONNX file, or one that onnxruntime cannot open.
    """
    import onnx

    from lvtrain.weights.onnx.file import session

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise UserError(f"{path} is not an ONNX file ({type(error).__name__})") from error
    if not model.graph.input or not model.graph.output:
        raise UserError(f"{path} has no input or no output")
    if len(_shape(model.graph.input[0])) != 4:
        raise UserError(
            f"{path} takes {_shape(model.graph.input[0])}, not images [N, 3, H, W]; it is not a face recogniser"
        )
    file = _File(
        path, model, path.stat().st_size, _shape(model.graph.input[0]), _shape(model.graph.output[0]), session(path)
    )
    verdicts = []
    for client, rule in _RULES.items():
        reasons = tuple(rule(file))
        verdicts.append(Verdict(client, not reasons, reasons))
    return verdicts


def _shape(value: Any) -> list[int | str]:
    return [dim.dim_param or (dim.dim_value or "?") for dim in value.type.tensor_type.shape.dim]


def _one_in_one_out(file: _File) -> list[str]:
    reasons = []
    if len(file.graph.input) != 1:
        reasons.append(f"{len(file.graph.input)} inputs, it takes 1")
    if len(file.graph.output) != 1:
        reasons.append(f"{len(file.graph.output)} outputs, it takes 1")
    return reasons


def _float_input(file: _File) -> list[str]:
    return [] if file.graph.input[0].type.tensor_type.elem_type == 1 else ["the input is not float32"]


def _external(file: _File) -> list[str]:
    missing = {
        entry.value
        for tensor in file.graph.initializer
        if tensor.data_location == 1
        for entry in tensor.external_data
        if entry.key == "location" and not (file.path.parent / entry.value).exists()
    }
    return [f"external data {name} is not beside it" for name in sorted(missing)]


def _normalised_inside(file: _File) -> bool:
    """Images in 0..255 and normalised ones give nearly the same direction only if the graph subtracts the mean itself."""
    side = file.input_shape[2]
    if not isinstance(side, int):
        return False
    names = [node.op_type for node in list(file.graph.node)[:8]]
    return "Sub" in names and ("Mul" in names or "Div" in names)


def _insightface(file: _File) -> list[str]:
    reasons = _one_in_one_out(file) + _float_input(file) + _external(file)
    height, width = file.input_shape[2], file.input_shape[3]
    if height != width or not isinstance(height, int) or height < 112 or height % 16:
        reasons.append(
            f"a {height}x{width} input is not routed to the recogniser: it must be square, at least 112, a multiple of 16"
        )
    if isinstance(file.input_shape[0], int) and file.input_shape[0] != 1:
        reasons.append(f"the batch is fixed at {file.input_shape[0]}; it sends any number")
    first = [node.name for node in list(file.graph.node)[:8]]
    fooled = [name for name in first if name.startswith(("Sub", "_minus")) or name.startswith(("Mul", "_mul"))]
    if fooled and not _normalised_inside(file):
        reasons.append(f"a node called {fooled[0]} among the first 8 makes it believe that the graph normalises")
    if _normalised_inside(file) and not fooled:
        reasons.append(
            "the graph normalises, but no node name (Sub*, Mul*) says so: it would normalise twice and be wrong"
        )
    return reasons


def _lvface(file: _File) -> list[str]:
    reasons = _one_in_one_out(file) + _float_input(file) + _external(file)
    if len(file.output_shape) != 2:
        return [*reasons, f"the output has shape {file.output_shape}, it takes [N, 512]"]
    if file.output_shape[1] not in (512, "?") and isinstance(file.output_shape[1], int):
        reasons.append(f"the embedding has {file.output_shape[1]} numbers, it takes 512")
    if isinstance(file.input_shape[0], str) and isinstance(file.output_shape[0], int):
        reasons.append("the batch is dynamic in the input but fixed in the output")
    if list(file.input_shape[1:]) != [3, 112, 112]:
        reasons.append(f"the input is {file.input_shape[1:]}, it takes [3, 112, 112]")
    if _normalised_inside(file):
        reasons.append("the graph normalises, and so does it: embeddings would be wrong")
    return reasons


def _uniface(file: _File) -> list[str]:
    reasons = _float_input(file) + _external(file)
    if isinstance(file.input_shape[0], int) and file.input_shape[0] != 1:
        reasons.append(f"the batch is fixed at {file.input_shape[0]}; it sends one image")
    if _normalised_inside(file):
        reasons.append("the graph normalises, and so does it: embeddings would be wrong")
    return reasons


def _mfr(file: _File) -> list[str]:
    from onnx import helper

    reasons = _one_in_one_out(file) + _float_input(file)
    if isinstance(file.input_shape[0], int):
        reasons.append("the batch is not dynamic")
    if list(file.input_shape[1:]) != [3, 112, 112]:
        reasons.append(f"the input is {file.input_shape[1:]}, it takes [3, 112, 112]")
    if file.size > _MFR_BYTES:
        reasons.append(f"{file.size / 2**20:.0f} MB, at most 1024 MB are taken")
    if len(file.graph.node) < 8:
        reasons.append(f"{len(file.graph.node)} nodes, fewer than 8")
    narrow = [t.name for t in file.graph.initializer if helper.tensor_dtype_to_np_dtype(t.data_type).itemsize < 4]
    if narrow:
        reasons.append(
            f'initialiser {narrow[0]} has elements under 4 bytes ("invalid weight type"), {len(narrow)} in all'
        )
    opset = max((entry.version for entry in file.model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if not reasons:
        output = file.run(np.random.default_rng(0).uniform(-1, 1, (32, 3, 112, 112)).astype(np.float32))
        if not np.isfinite(output).all():
            reasons.append("a batch of 32 gives NaN or infinity")
        if output.ndim != 2 or output.shape[1] > 1024:
            reasons.append(f"the output is {output.shape}, at most 1024 numbers an image are taken")
    if opset > 14:
        reasons.append(f"opset {opset}: the server's onnxruntime 1.8 reads up to 14; `export --opset 14` writes it")
    return reasons


_RULES = {"insightface": _insightface, "lvface": _lvface, "uniface": _uniface, "MFR-Ongoing": _mfr}
CLIENTS = tuple(_RULES)
