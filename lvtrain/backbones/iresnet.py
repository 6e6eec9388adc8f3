"""IResNet-18/34/50/100/200 of insightface's arcface_torch: image -> embedding, with its parameter names, so its
weights load as they are.

Residual blocks in the order BN, conv, BN, PReLU, conv, BN (He et al. 2016 as modified by ArcFace, arXiv 1801.07698),
no pooling, a linear over all positions and a last BatchNorm whose weight is held at 1. `first_shortcut="subsample"` is
the variant of AdaFace and CVLface (their IR-18, -34, -50, -101).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import nn

from lvtrain.backbones.memory import Recompute, Share, run_blocks
from lvtrain.backbones.norm import Float32BatchNorm1d, Float32BatchNorm2d

LAYERS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
    "iresnet200": (6, 26, 60, 6),
}
_WIDTHS = (64, 128, 256, 512)
_EPS = 1e-5


class _Block(nn.Module):
    """The first block of a layer halves the picture and projects its input; the others add their input as it is."""

    def __init__(self, width_in: int, width: int, stride: int, subsample: bool = False) -> None:
        super().__init__()
        self.bn1 = Float32BatchNorm2d(width_in, eps=_EPS)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
        self.bn2 = Float32BatchNorm2d(width, eps=_EPS)
        self.prelu = nn.PReLU(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn3 = Float32BatchNorm2d(width, eps=_EPS)
        self.downsample: nn.Module = nn.Identity()
        if subsample:
            self.downsample = nn.MaxPool2d(1, stride)  # every other pixel
        elif stride != 1 or width_in != width:
            project = nn.Conv2d(width_in, width, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(project, Float32BatchNorm2d(width, eps=_EPS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(self.bn1(x))
        y = self.conv2(self.prelu(self.bn2(y)))
        return self.bn3(y) + self.downsample(x)


class IResNet(nn.Module):
    """`[B, 3, image_size, image_size]` float -> `[B, embedding_dim]` float32, not normalised.

    layers: blocks in each of the four layers. dropout: before the last linear (arcface_torch: 0 for its large runs,
    0.4 for small data).
    first_shortcut: how the very first block, which keeps its width, brings its input to half the size: "project" (1x1
    convolution and BatchNorm, arcface_torch) or "subsample" (every other pixel).
    checkpoint_blocks, checkpoint_every: see `lvtrain.backbones.memory`.
    """

    def __init__(
        self,
        *,
        layers: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt],
        embedding_dim: PositiveInt = 512,
        image_size: PositiveInt = 112,
        dropout: Share = 0.0,
        first_shortcut: Literal["project", "subsample"] = "project",
        checkpoint_blocks: Recompute = "none",
        checkpoint_every: PositiveInt = 1,
    ) -> None:
        super().__init__()
        self.embedding_dim, self.image_size = embedding_dim, image_size
        self.checkpoint_blocks, self.checkpoint_every = checkpoint_blocks, checkpoint_every
        self.conv1 = nn.Conv2d(3, _WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = Float32BatchNorm2d(_WIDTHS[0], eps=_EPS)
        self.prelu = nn.PReLU(_WIDTHS[0])
        width_in, side = _WIDTHS[0], image_size
        for number, (width, count) in enumerate(zip(_WIDTHS, layers), start=1):
            subsample = number == 1 and first_shortcut == "subsample"
            blocks = [_Block(width_in, width, 2, subsample), *(_Block(width, width, 1) for _ in range(count - 1))]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            width_in, side = width, (side + 1) // 2
        self.bn2 = Float32BatchNorm2d(width_in, eps=_EPS)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width_in * side * side, embedding_dim)
        self.features = Float32BatchNorm1d(embedding_dim, eps=_EPS)
        self.features.weight.requires_grad = False  # constant 1: the embedding's scale is not to be learnt twice
        self.num_tokens, self.dim = side * side, width_in
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    def forward(self, images: torch.Tensor, return_tokens: bool = False) -> Any:
        """Embeddings `[B, embedding_dim]`, or with `return_tokens` `(positions [B, N, 512], embeddings)`."""
        x = self.prelu(self.bn1(self.conv1(images.contiguous(memory_format=torch.channels_last))))
        blocks = [block for number in range(1, 5) for block in self.get_submodule(f"layer{number}").children()]
        x = self.bn2(run_blocks(blocks, x, self.checkpoint_blocks if self.training else "none", self.checkpoint_every))
        embedding = self.features(self.fc(self.dropout(x.flatten(1))))
        return (x.flatten(2).transpose(1, 2), embedding) if return_tokens else embedding

    def tokens(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(positions of the last feature map [B, N, 512], embeddings)`; positions are row-major."""
        return self(images, return_tokens=True)
