"""Which decoder a loader uses."""

from __future__ import annotations

import importlib.util

from lvtrain.data.decoding.job import Backend, DecodeSpec
from lvtrain.errors import UserError


def make_backend(name: str, spec: DecodeSpec) -> Backend:
    """The decoder `name`; `auto` is DALI where it can be imported, else torch.

    Raises:
        UserError: an unknown name, or DALI where it cannot be imported.
    """
    if name not in ("auto", "dali", "torch"):
        raise UserError(f"data.backend={name} is not known; choose auto, dali or torch")
    if name == "auto":
        name = "dali" if _has_dali() else "torch"
    if name == "dali":
        try:
            from lvtrain.data.decoding.dali import DaliBackend
        except ImportError as error:
            raise UserError(
                f"DALI cannot be imported ({error}); install nvidia-dali or set data.backend=torch"
            ) from None
        return DaliBackend(spec)
    from lvtrain.data.decoding.torch_backend import TorchBackend

    return TorchBackend(spec)


def _has_dali() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # no package of NVIDIA's at all
        return False
