"""An ONNX recogniser as a function of arrays, run by onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lvtrain.errors import UserError

_TYPES = {"tensor(float16)": np.float16, "tensor(double)": np.float64, "tensor(uint8)": np.uint8}


def session(path: str | Path, *, exact: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    """A function `[N, 3, H, W]`, or whatever the file takes, -> float32 `[N, d]` over onnxruntime, whatever its input and output are called.

    Images are brought to the input's type. `exact` keeps to the CPU: on a GPU onnxruntime multiplies in TF32. On the CPU it has as many
    threads as torch (OMP_NUM_THREADS), so that ranks do not take each other's cores.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised as well
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        running = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"] if exact else _providers(onnxruntime)
        )
    except Exception as error:
        raise UserError(f"{path} cannot be opened by onnxruntime: {' '.join(str(error).split())[:200]}") from error
    (source, *_), target = running.get_inputs(), running.get_outputs()[0].name
    kind = _TYPES.get(source.type, np.float32)

    def run(images: np.ndarray) -> np.ndarray:
        try:
            found: np.ndarray = running.run([target], {source.name: np.ascontiguousarray(images, dtype=kind)})[0]
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path} cannot be run on images {list(images.shape)}: {reason}") from error
        return found

    return run


def _providers(onnxruntime) -> list[str]:  # type: ignore[no-untyped-def]
    available = onnxruntime.get_available_providers()
    return [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
