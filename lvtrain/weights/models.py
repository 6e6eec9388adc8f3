"""`load_model(path)`: weights of any format that lvtrain reads, as one `torch.nn.Module` that embeds faces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
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
from lvtrain.weights.model_input import OURS, ModelInput
from lvtrain.weights.onnx.file import recogniser, session
from lvtrain.weights.onnx.input import read_input
from lvtrain.weights.source import open_source


class Model(nn.Module):
    """A face recogniser for inference, in evaluation mode: `load_model` makes it.

    `model.embed(images)` takes files and photographs, and `model(images)` a batch of tensors. Neither gives gradients; to train on, take
    `model.backbone`.

    Args:
        run: embeds images that are as `takes` says; only for a model without a `backbone`.

    Attributes:
        name: architecture and path, for messages.
        embedding_dim: d, numbers of an embedding.
        image_size: S, pixels of a side of an image.
        backbone: the network; None for an ONNX file.
        architecture: how to build the backbone; None for an ONNX file.
        weights: which weights these are: a run's step and phase, a foreign format.
        notes: how they fit the architecture.
        takes: how the network takes its images. `forward` and `embed` take ours and turn them; `backbone` alone does not.
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
        takes: ModelInput = OURS,
    ) -> None:
        super().__init__()
        self.takes = takes
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

    def forward(self, images: torch.Tensor, *, takes: ModelInput | None = None) -> torch.Tensor:
        """Embeddings of aligned faces, float32 `[B, d]`, **not** L2-normalised.

        Args:
            images: RGB `[B, 3, S, S]` with S = `image_size`; uint8 (0 to 255), or floats that are normalised already, (x - 127.5) / 127.5.
                On any device.
            takes: feed the network so, not as `self.takes` says.
        """
        images = self._given(images)
        with torch.inference_mode():
            images = (takes or self.takes).given(images)
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
        setting = extract.Setting(World(0, 1, 0, self.device), self.device, min(batch, len(faces)), self.image_size)
        rows = setting.embed(self.forward, faces, mirror=mirror)
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
            found: tuple[torch.Tensor, torch.Tensor] = self.backbone.tokens(  # type: ignore[operator]
                self.takes.given(self._given(images))
            )
        return found

    def extra_repr(self) -> str:
        """What `print(model)` shows of it."""
        return f"{self.name}, embedding_dim={self.embedding_dim}, image_size={self.image_size}"


def load_model(
    path: str | Path, *, device: torch.device | str = "cpu", average: bool = False, takes: str = ""
) -> Model:
    """Opens weights as a model that embeds faces, in evaluation mode.

        model = lvtrain.load_model("runs/mine")
        embeddings = model.embed(["a.jpg", "b.jpg"])     # float32 [2, 512], of unit length

    Colour order and normalisation are the same for all callers: the model turns images into what its file takes, and `model.takes.line()`
    says what that is and how it was found (see `lvtrain.weights.model_input`).

    Args:
        path: a run (its newest valid checkpoint), a checkpoint, an exported folder, a .pt, .pth, .ckpt or .safetensors file of another
            project, an .onnx file, or an insightface pack (a folder of .onnx files).
        device: of the backbone; an ONNX file runs where onnxruntime can.
        average: take a run's moving average of the weights (`ema` in its recipe) instead of the weights themselves.
        takes: how the file takes images, where it does not say so itself: "bgr 0..255", "imagenet", "mean=127.5 std=128".

    Raises:
        UserError: words that `takes` does not know, nothing usable at `path`, a damaged file, no moving average, or no backbone of lvtrain fits the weights.
    """
    path = recogniser(Path(path))
    if path.suffix == ".onnx":
        if average:
            raise UserError(f"{path} has no moving average; runs have one where the recipe has an ema section")
        return _onnx(path, takes)
    source = open_source(path, average=average, takes=takes, keep_range=True)
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
        takes=replace(source.takes, size=architecture.image_size),
    )


def finite(state: Mapping[str, torch.Tensor], source: Path) -> None:
    """Raises UserError for weights that hold NaN or infinity."""
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{source}: {name} holds NaN or infinity; the model has diverged, take an earlier checkpoint"
            )


def _onnx(path: Path, words: str) -> Model:
    run = session(path)
    taken = read_input(path, words)
    example = taken.given(torch.zeros(1, 3, taken.size, taken.size)).numpy()
    fixed = taken.batch
    if not fixed:
        try:
            fixed = None if len(run(np.concatenate([example, example]))) == 2 else 1
        except UserError:  # it promises any batch, but its reshapes were made for one image (arcface_torch's mbf)
            fixed = 1

    def embed(images: torch.Tensor) -> torch.Tensor:
        array = images.detach().cpu().numpy()
        if not fixed:
            return torch.from_numpy(run(array)).float()
        # a file with a fixed batch: pad the last part
        parts = []
        for start in range(0, len(array), fixed):
            part = array[start : start + fixed]
            filled = np.concatenate([part, np.zeros((fixed - len(part), *part.shape[1:]), dtype=part.dtype)])
            parts.append(torch.from_numpy(run(filled)[: len(part)]))
        return torch.cat(parts).float()

    found = embed(torch.from_numpy(example))
    if found.ndim != 2:
        raise UserError(
            f"{path} gives {list(found.shape)} for one image, not one embedding [1, d]; it is not a face recogniser"
        )
    return Model(f"ONNX {path}", found.shape[1], taken.size, run=embed, takes=replace(taken, batch=fixed))
