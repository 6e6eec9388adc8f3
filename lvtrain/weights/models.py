"""`load_model(path)`: weights of any format that lvtrain reads, as one `torch.nn.Module` that embeds faces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lvtrain.distributed.world import World
from lvtrain.errors import UserError
from lvtrain.weights import extract
from lvtrain.weights.architecture import Architecture, fit
from lvtrain.weights.faces import Faces
from lvtrain.weights.onnx_graph import read_graph
from lvtrain.weights.onnx_pack import recogniser
from lvtrain.weights.onnx_session import session
from lvtrain.weights.source import open_source


class Model(nn.Module):
    """A face recogniser for inference, in evaluation mode: `load_model` makes it.

    `model.embed(images)` takes files and photographs, and `model(images)` a batch of tensors. Neither gives gradients; to train on, take
    `model.backbone`.

    Args:
        run: embeds normalised images, see `forward`; only for a model without a `backbone`.

    Attributes:
        name: architecture and path, for messages.
        embedding_dim: d, numbers of an embedding.
        image_size: S, pixels of a side of an image.
        backbone: the network; None for an ONNX file.
        architecture: how to build the backbone; None for an ONNX file.
        weights: which weights these are: a run's step and phase, a foreign format.
        notes: how they fit the architecture.
    """

    def __init__(
        self,
        name: str,
        embedding_dim: int,
        image_size: int,
        *,
        backbone: nn.Module | None = None,
        architecture: Architecture | None = None,
        run: Callable[[torch.Tensor], torch.Tensor] | None = None,
        weights: str = "",
        notes: str = "",
    ) -> None:
        super().__init__()
        self.name, self.embedding_dim, self.image_size = name, embedding_dim, image_size
        self.backbone, self.architecture = backbone, architecture
        self.weights, self.notes = weights, notes
        self._run = run
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are; the CPU for an ONNX file, whose runtime chooses itself."""
        tensor = next(self.parameters(), None)
        return torch.device("cpu") if tensor is None else tensor.device

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings of aligned faces, float32 `[B, d]`, **not** L2-normalised.

        Args:
            images: RGB `[B, 3, S, S]` with S = `image_size`; uint8 (0 to 255), or floats that are normalised already, (x - 127.5) / 127.5.
                On any device.
        """
        images = self._given(images)
        with torch.inference_mode():
            if self._run is not None:
                return self._run(images)
            assert self.backbone is not None
            embeddings: torch.Tensor = self.backbone(images)
        return embeddings.float()

    def _given(self, images: torch.Tensor) -> torch.Tensor:
        return (extract.normalise(images) if images.dtype == torch.uint8 else images).to(self.device)

    def embed(
        self, images: extract.Images | Any, *, batch: int = 64, mirror: bool = False, align: bool = False
    ) -> np.ndarray:
        """Embeddings float32 `[N, d]` of unit length (L2-normalised), in order: their dot products are cosines.

        Images are expected aligned to insightface's five points, 112x112, as training and evaluation take them. A square image of another
        size is resized (bilinear), as evaluation does. One that is not square is refused, unless `align` is set.

        Args:
            images: a sequence of paths, encoded images (bytes), uint8 RGB arrays `[height, width, 3]` (OpenCV reads BGR: turn it with
                `image[..., ::-1]`) or PIL images; or an array `[N, height, width, 3]`; or one of these alone, which gives `[1, d]`.
                EXIF rotations are followed.
            batch: images per forward call. A row does not depend on it, except for rounding.
            mirror: add the embedding of the mirrored image before normalising, as the verification protocols do.
            align: find the largest face of each photograph and align it (needs `lvtrain[align]`).

        Raises:
            UserError: an image that cannot be read, is not square, or shows no face; or the model gives NaN or infinity.
        """
        faces = Faces(images, self.image_size, align=align)
        if not len(faces):
            return np.zeros((0, self.embedding_dim), dtype=np.float32)
        rows = extract.embed(
            self.forward,
            faces,
            world=World(0, 1, 0, self.device),
            batch=min(batch, len(faces)),
            device=self.device,
            image_size=self.image_size,
            mirror=mirror,
        )
        if not np.isfinite(rows).all():
            raise UserError(f"{self.name} gives NaN or infinity; the model has diverged, take an earlier checkpoint")
        unit: np.ndarray = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-12))
        return unit

    def tokens(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Patch tokens `[B, N, dim]`, which a vision-language model takes, and embeddings `[B, d]`; images as in `forward`.

        Raises:
            UserError: a model without patch tokens (ONNX, IResNet).
        """
        if self.backbone is None or not hasattr(self.backbone, "tokens"):
            raise UserError(
                f"{self.name} gives no patch tokens; load a ViT's weights, not {'an ONNX file' if self.backbone is None else 'a CNN'}"
            )
        with torch.inference_mode():
            found: tuple[torch.Tensor, torch.Tensor] = self.backbone.tokens(self._given(images))  # type: ignore[operator]
        return found

    def extra_repr(self) -> str:
        """What `print(model)` shows of it."""
        return f"{self.name}, embedding_dim={self.embedding_dim}, image_size={self.image_size}"


def load_model(path: str | Path, *, device: torch.device | str = "cpu", average: bool = False) -> Model:
    """Opens weights as a model that embeds faces, in evaluation mode.

        model = lvtrain.load_model("runs/mine")
        embeddings = model.embed(["a.jpg", "b.jpg"])     # float32 [2, 512], of unit length

    Colour order and normalisation are the same for all: BGR weights are turned to RGB, and an ONNX file that normalises pixels itself gets
    pixels.

    Args:
        path: a run (its newest valid checkpoint), a checkpoint, an exported folder, a .pt, .pth, .ckpt or .safetensors file of another
            project, an .onnx file, or an insightface pack (a folder of .onnx files).
        device: of the backbone; an ONNX file runs where onnxruntime can.
        average: take a run's moving average of the weights (`ema` in its recipe) instead of the weights themselves.

    Raises:
        UserError: nothing usable at `path`, a damaged file, no moving average, or no backbone of lvtrain fits the weights.
    """
    path = recogniser(Path(path))
    if path.suffix == ".onnx":
        if average:
            raise UserError(f"{path} has no moving average; runs have one where the recipe has an ema section")
        return _onnx(path)
    source = open_source(path, average=average)
    architecture, weights = source.architecture(), source.kind
    backbone = architecture.create()
    report = fit(backbone, source.state())
    return Model(
        f"{architecture.name} from {path}",
        architecture.embedding_dim,
        architecture.image_size,
        backbone=backbone.to(device),
        architecture=architecture,
        weights=weights,
        notes=f"{weights}; {report}",
    )


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
    return Model(f"ONNX {path}", found.shape[1], side, run=forward)
