"""An ONNX recogniser: which file it is, and how onnxruntime runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lvtrain.errors import UserError
from lvtrain.files.reading import parse_json

_TYPES = {"tensor(float16)": np.float16, "tensor(double)": np.float64, "tensor(uint8)": np.uint8}
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
            return path / str(parse_json((path / "manifest.json").read_text())["tasks"]["recognition"]["file"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}/manifest.json names no recognition file; name the ONNX file itself") from None
    found = files if len(files) == 1 else [file for file in files if _shape(file)[2:] == [_SIDE, _SIDE]]
    if len(found) != 1:
        names = ", ".join(file.name for file in found or files)
        raise UserError(f"{path} holds {len(found)} recognisers ({names}); name the ONNX file itself")
    return found[0]


def load(path: Path) -> Any:
    """The file's `onnx.ModelProto`, its local functions inlined.

    Raises:
        UserError: onnx is not installed, or not an ONNX file.
    """
    try:
        import onnx
        import onnx.inliner
    except ImportError as error:
        raise UserError(f'{path}: reading ONNX needs onnx and onnxruntime; pip install "lvtrain[tools]"') from error
    try:
        return onnx.inliner.inline_local_functions(onnx.load(str(path)))
    except Exception as error:
        raise UserError(f"{path} is not a whole ONNX file ({type(error).__name__}); copy it again") from error


def _shape(file: Path) -> list[Any]:
    """The shape of the file's first input; None where it is free."""
    return [size if isinstance(size, int) else None for size in _opened(file, optimise=False).get_inputs()[0].shape]


def _opened(path: str | Path, *, exact: bool = True, optimise: bool = True) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised as well
    options.intra_op_num_threads = torch.get_num_threads()
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    here = onnxruntime.get_available_providers()
    wanted = ["CPUExecutionProvider"] if exact else ["CUDAExecutionProvider", "CPUExecutionProvider"]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=[name for name in wanted if name in here])
    except Exception as error:
        raise UserError(f"{path} cannot be opened by onnxruntime: {' '.join(str(error).split())[:200]}") from error


def session(path: str | Path, *, exact: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    """A function `[N, 3, H, W]`, or whatever the file takes, -> float32 `[N, d]` over onnxruntime, whatever its input and output are called.

    Images are brought to the input's type. `exact` keeps to the CPU: on a GPU onnxruntime multiplies in TF32. On the CPU it has as many
    threads as torch (OMP_NUM_THREADS), so that ranks do not take each other's cores.
    """
    running = _opened(path, exact=exact)
    (source, *_), target = running.get_inputs(), running.get_outputs()[0].name
    kind = _TYPES.get(source.type, np.float32)

    def run(images: np.ndarray) -> np.ndarray:
        try:
            found: np.ndarray = running.run([target], {source.name: np.ascontiguousarray(images, dtype=kind)})[0]
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path} cannot be run on images {list(images.shape)}: {reason}") from error
        # converted from Caffe or OpenVINO, an embedding is a feature map of one pixel
        return found.reshape(found.shape[:2]) if found.ndim > 2 and set(found.shape[2:]) == {1} else found

    return run
