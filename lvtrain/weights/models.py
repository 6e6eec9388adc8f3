"""`load_model(path)`: any of the things people have, as one callable on normalised images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lvtrain.errors import UserError
from lvtrain.weights.architecture import Architecture, fit
from lvtrain.weights.onnx_graph import read_graph
from lvtrain.weights.onnx_session import session
from lvtrain.weights.source import open_source


@dataclass
class Model:
    """`forward`: float32 `[B, 3, S, S]`, RGB, (x - 127.5) / 127.5 -> float32 `[B, d]`, not L2-normalised. `backbone` is None for an ONNX file.

    `tokens(images)` gives `(patch tokens [B, N, dim], embeddings [B, d])`: the patch tokens are what a vision-language model takes. `weights` says
    which weights these are (a run's step and phase, a foreign format), `notes` how they fitted.
    """

    name: str
    forward: Callable[[torch.Tensor], torch.Tensor]
    embedding_dim: int
    image_size: int
    backbone: nn.Module | None
    architecture: Architecture | None
    weights: str = ""
    notes: str = ""

    def tokens(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Raises UserError for a model without patch tokens (ONNX, IResNet)."""
        if self.backbone is None or not hasattr(self.backbone, "tokens"):
            raise UserError(
                f"{self.name} gives no patch tokens; load a ViT's weights, not {'an ONNX file' if self.backbone is None else 'a CNN'}"
            )
        with torch.inference_mode():
            found: tuple[torch.Tensor, torch.Tensor] = self.backbone.tokens(images)  # type: ignore[operator]
        return found


def load_model(path: str | Path, *, device: torch.device | str = "cpu", average: bool = False) -> Model:
    """Opens a run, a checkpoint, an exported folder, others' weights (`reading`) or an ONNX file.

    `average` takes a run's moving average of the weights instead of the weights themselves.

    Raises:
        UserError: nothing usable at `path`, or no backbone of ours fits it.
    """
    path = Path(path)
    if path.suffix == ".onnx":
        return _onnx(path)
    source = open_source(path, average=average)
    architecture, weights = source.architecture(), source.kind
    backbone = architecture.create()
    report = fit(backbone, source.state())
    backbone = backbone.to(device).eval()

    def forward(images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            embeddings: torch.Tensor = backbone(images.to(device))
        return embeddings.float()

    name = f"{architecture.name} from {path}"
    width, side = architecture.embedding_dim, architecture.image_size
    return Model(name, forward, width, side, backbone, architecture, weights, f"{weights}; {report}")


def finite(state: Mapping[str, torch.Tensor], source: Path) -> None:
    """Raises UserError for weights that hold NaN or infinity."""
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{source}: {name} holds NaN or infinity; the model has diverged, take an earlier checkpoint"
            )


def _onnx(path: Path) -> Model:
    run = session(path)
    import onnx

    taken = onnx.load(str(path), load_external_data=False).graph.input[0].type.tensor_type
    if len(taken.shape.dim) != 4 or taken.elem_type != onnx.TensorProto.FLOAT:
        raise UserError(f"{path} does not take float32 images [N, 3, H, W]; it is not a face recogniser")
    side = taken.shape.dim[2].dim_value or 112
    fixed = taken.shape.dim[0].dim_value

    def forward(images: torch.Tensor) -> torch.Tensor:
        array = given(images.detach().float().cpu().numpy())
        if not fixed:
            return torch.from_numpy(run(array))
        # a file with a fixed batch: pad the last part
        parts = []
        for start in range(0, len(array), fixed):
            part = array[start : start + fixed]
            padded = (
                torch.from_numpy(part)
                if len(part) == fixed
                else torch.cat([torch.from_numpy(part), torch.zeros(fixed - len(part), *part.shape[1:])])
            )
            parts.append(torch.from_numpy(run(padded.numpy()))[: len(part)])
        return torch.cat(parts)

    try:
        given = read_graph(path).given
    except UserError:  # not a network that we know the layers of: it takes what nearly all take

        def given(images: np.ndarray) -> np.ndarray:
            return images

    if not fixed:
        try:
            fixed = 0 if len(run(np.zeros((2, 3, side, side), dtype=np.float32))) == 2 else 1
        except UserError:  # it promises any batch, but its reshapes were made for one image (arcface_torch's mbf)
            fixed = 1
    found = forward(torch.zeros(1, 3, side, side))
    if found.ndim != 2:
        raise UserError(
            f"{path} gives {list(found.shape)} for one image, not one embedding [1, d]; it is not a face recogniser"
        )
    return Model(f"ONNX {path}", forward, found.shape[1], side, None, None)
