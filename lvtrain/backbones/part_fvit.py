"""Part fViT of LAFS (arXiv 2403.08161; Sun and Tzimiropoulos, BMVC 2022): fViT with patches around landmarks.

A small landmark CNN gives 196 points, min-max scaled to the image. An 8x8 patch is sampled around each, with one
differentiable `grid_sample`. Its names are those of the released code: `stn`, `output_layer`.

Our reading: the paper gives Part fViT-Tiny as "15.28M and 2.48G Flops" only. Dim 256, depth 12, 8 heads of 64 and MLP
1024 have 15.6 M parameters and 2.5 G multiply-adds in linear layers.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import NonNegativeFloat
from torch import nn

from lvtrain.backbones.fvit import FViT
from lvtrain.backbones.landmarks.cnn import LandmarkFeatures, ReleasedLandmarkFeatures
from lvtrain.backbones.landmarks.patches import grid_landmarks, sample_patches
from lvtrain.backbones.memory import Share
from lvtrain.backbones.registry import register
from lvtrain.errors import UserError


@register("part_fvit_tiny", dim=256, depth=12, heads=8, mlp_dim=1024)
@register("part_fvit_base", dim=768, depth=12, heads=11, mlp_dim=2048)
class PartFViT(FViT):
    """fViT with patches around landmarks: `[B, 3, image_size, image_size]` float -> `[B, embedding_dim]` float32.

    Args:
        landmark_margin: points are min-max scaled, for each image and axis, to [margin, side - 1 - margin] pixels. The
            default of half a patch keeps every patch inside the image, and starts training on fViT's grid (our reading).
        released: compute as LAFS's released code, for its weights. It has another landmark CNN (`ReleasedLandmarkFeatures`), scales x
            and y together to [0, image_size - 1], counts the first pixel's centre as (1, 1), and reads patches column by
            column. `landmark_margin` is then not used.
        freeze_landmarks: the landmark CNN is not trained, and its BatchNorm uses its stored statistics.
        landmark_dropout: of the landmark CNN's features, before its linear layer; 0.5 in LAFS's released code.
        fvit: arguments of `FViT`.
    """

    landmark_cnn = ("stn.", "output_layer.")
    # the landmark CNN learns at the rate of what stands before the blocks, as in LAFS's released code
    first_names = (*FViT.first_names, *landmark_cnn)

    def __init__(
        self,
        *,
        landmark_margin: NonNegativeFloat = 3.5,
        released: bool = False,
        freeze_landmarks: bool = False,
        landmark_dropout: Share = 0.0,
        **fvit: Any,
    ) -> None:
        super().__init__(**fvit)
        self.landmark_margin, self.released, self.freeze_landmarks = landmark_margin, released, freeze_landmarks
        self.stn: Any = ReleasedLandmarkFeatures() if released else LandmarkFeatures()
        linear = nn.Linear(self.stn.num_features, 2 * self.num_tokens)
        dropout = nn.Dropout(landmark_dropout) if landmark_dropout else nn.Identity()
        self.output_layer = nn.Sequential(dropout, linear)
        nn.init.normal_(linear.weight, std=1e-3)
        with torch.no_grad():  # start on the grid; coordinates are shares of the image
            linear.bias.copy_((grid_landmarks(self.side, self.patch) / (self.image_size - 1)).flatten())
        if freeze_landmarks:
            self.stn.requires_grad_(False)
            self.output_layer.requires_grad_(False)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if self.freeze_landmarks:
            self.stn.eval()
            self.output_layer.eval()
        return self

    def landmark_state(self) -> dict[str, torch.Tensor]:
        """The tensors of the landmark CNN, by their names in `state_dict()`."""
        return {name: tensor for name, tensor in self.state_dict().items() if name.startswith(self.landmark_cnn)}

    def predict_landmarks(self, images: torch.Tensor) -> torch.Tensor:
        """The landmark CNN's points, `[B, num_tokens, 2]` float32, (x, y) in pixels, min-max scaled to the given images."""
        features, last = self.stn(images), images.shape[-1] - 1
        with torch.autocast(images.device.type, enabled=False):  # points in bfloat16 would be off by half a pixel
            points = self.output_layer(features.to(torch.promote_types(images.dtype, torch.float32)))
            points = points.unflatten(1, (self.num_tokens, 2))
            if self.released:
                low, high = points.amin(dim=(1, 2), keepdim=True), points.amax(dim=(1, 2), keepdim=True)
                return (points - low) / (high - low).clamp_min(1e-6) * last - 1
            low, high = points.amin(dim=1, keepdim=True), points.amax(dim=1, keepdim=True)
            unit = (points - low) / (high - low).clamp_min(1e-6)
            return self.landmark_margin + unit * (last - 2 * self.landmark_margin)

    def forward(  # type: ignore[override]
        self,
        images: torch.Tensor,
        landmarks: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        return_landmarks: bool = False,
        return_tokens: bool = False,
    ) -> Any:
        """Embeddings `[B, embedding_dim]`, or a tuple of tokens `[B, N, dim]`, embeddings and landmarks `[B, N, 2]`.

        Args:
            images: float `[B, 3, S, S]`.
            landmarks: `[B, N, 2]`, (x, y) in pixels: any number of points in any order. Absent: the landmark CNN's.
            positions: int64 `[N]` or `[B, N]`, the position embedding (0 to num_tokens - 1) of each landmark. Absent:
                landmark i has position i.
            return_landmarks: return the landmarks, too.
            return_tokens: return the tokens, too.

        Raises:
            UserError: more landmarks than position embeddings, and no `positions`.
        """
        if landmarks is None:
            landmarks = self.predict_landmarks(images)
        number = landmarks.shape[1]
        if positions is None:
            if number > self.num_tokens:
                raise UserError(
                    f"Part fViT: {number} landmarks but only {self.num_tokens} positions; say which with positions="
                )
            embedded = self.pos_embedding[:, 1 : number + 1]
        else:
            embedded = self.pos_embedding[0, 1:][positions]
            embedded = embedded if embedded.ndim == 3 else embedded[None]
        patches = sample_patches(images, landmarks, self.patch)
        if self.released:  # (row, column, colour) -> (column, row, colour)
            patches = patches.unflatten(2, (self.patch, self.patch, 3)).transpose(2, 3).flatten(2)
        output = self.encode(patches, embedded, return_tokens)
        if not return_landmarks:
            return output
        return (*output, landmarks) if return_tokens else (output, landmarks)
