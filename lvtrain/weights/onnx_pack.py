"""insightface's folders of ONNX files: which file recognises?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lvtrain.errors import UserError

_SIDE = 112  # pixels: insightface's own rule for what a recogniser takes


def recogniser(path: Path) -> Path:
    """The recogniser's ONNX file of an insightface pack (`buffalo_l/`, or a V2 package with `manifest.json`); any other path as it is.

    Raises:
        UserError: a pack without a recogniser, or with several.
    """
    files = sorted(path.glob("*.onnx")) if path.is_dir() else []
    if not files or any(path.glob("*.safetensors")):
        return path
    if (path / "manifest.json").is_file():
        try:
            return path / str(json.loads((path / "manifest.json").read_text())["tasks"]["recognition"]["file"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}/manifest.json names no recognition file; name the ONNX file itself") from None
    found = files if len(files) == 1 else [file for file in files if _takes(file)[2:] == [_SIDE, _SIDE]]
    if len(found) != 1:
        names = ", ".join(file.name for file in found or files)
        raise UserError(f"{path} holds {len(found)} recognisers ({names}); name the ONNX file itself")
    return found[0]


def _takes(file: Path) -> list[Any]:
    """The shape of the file's first input; None where it is free."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UserError(f"{file} cannot be opened by onnxruntime: {' '.join(str(error).split())[:200]}") from error
    return [size if isinstance(size, int) else None for size in session.get_inputs()[0].shape]
