"""MobileFaceNet (arXiv 1804.07573) as insightface's arcface_torch trains it: image -> embedding, with its parameter
names, so the weights of its `mbf` and `mbf_large` load as they are.

Every block widens by a 1x1 convolution, filters by a depthwise 3x3 one and narrows by a linear 1x1 one; the last feature
map is weighed position by position (a depthwise convolution as large as the map) and brought to the embedding. `mbf` is
the network of insightface's w600k_mbf.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import PositiveInt
from torch import nn

from lvtrain.backbones.memory import Recompute, run_blocks
from lvtrain.backbones.norm import Float32BatchNorm1d, Float32BatchNorm2d


@dataclass(frozen=True)
class MobileFaceNetShape:
    """Blocks of each of the four stages, and the factor on the paper's widths of 64 and 128."""

    blocks: tuple[int, int, int, int]
    scale: int


SHAPES = {
    "mobilefacenet": MobileFaceNetShape((1, 4, 6, 2), 2),
    "mobilefacenet_large": MobileFaceNetShape((2, 8, 12, 4), 4),
}
_LAST = 512  # width of the last feature map, whatever the scale


class _Layers(nn.Module):
    """Modules one after another, named `layers.i`; `adds_input` makes a residual block of them."""

    def __init__(self, *layers: nn.Module, adds_input: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.adds_input = adds_input

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x) if self.adds_input else self.layers(x)


def _linear_conv(width_in: int, width: int, kernel: int = 1, groups: int = 1) -> _Layers:
    conv = nn.Conv2d(width_in, width, kernel, groups=groups, bias=False)
    return _Layers(conv, Float32BatchNorm2d(width))


def _conv(width_in: int, width: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> _Layers:
    conv = nn.Conv2d(width_in, width, kernel, stride, kernel // 2, groups=groups, bias=False)
    return _Layers(conv, Float32BatchNorm2d(width), nn.PReLU(width))


def _bottleneck(width_in: int, width: int, expanded: int, stride: int = 1, adds_input: bool = False) -> _Layers:
    layers = (_conv(width_in, expanded), _conv(expanded, expanded, 3, stride, expanded), _linear_conv(expanded, width))
    return _Layers(*layers, adds_input=adds_input)


def _residuals(width: int, expanded: int, count: int) -> _Layers:
    return _Layers(*(_bottleneck(width, width, expanded, adds_input=True) for _ in range(count)))


class MobileFaceNet(nn.Module):
    """`[B, 3, image_size, image_size]` float -> `[B, embedding_dim]` float32, not normalised.

    blocks: residual blocks of the four stages; a first stage of 1 is a grouped convolution instead, as in the paper.
    scale: factor on the widths; the depthwise convolutions keep the paper's (128, 256, 512), as in arcface_torch.
    checkpoint_blocks, checkpoint_every: see `lvtrain.backbones.memory`.
    """

    def __init__(
        self,
        *,
        blocks: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt],
        scale: PositiveInt,
        embedding_dim: PositiveInt = 512,
        image_size: PositiveInt = 112,
        checkpoint_blocks: Recompute = "none",
        checkpoint_every: PositiveInt = 1,
    ) -> None:
        super().__init__()
        self.embedding_dim, self.image_size = embedding_dim, image_size
        self.checkpoint_blocks, self.checkpoint_every = checkpoint_blocks, checkpoint_every
        narrow, wide, side = 64 * scale, 128 * scale, -(-image_size // 16)
        first = _conv(narrow, narrow, 3, groups=64) if blocks[0] == 1 else _residuals(narrow, 128, blocks[0])
        self.layers = nn.ModuleList(
            [
                _conv(3, narrow, 3, stride=2),
                first,
                _bottleneck(narrow, narrow, 128, stride=2),
                _residuals(narrow, 128, blocks[1]),
                _bottleneck(narrow, wide, 256, stride=2),
                _residuals(wide, 256, blocks[2]),
                _bottleneck(wide, wide, 512, stride=2),
                _residuals(wide, 256, blocks[3]),
            ]
        )
        self.conv_sep = _conv(wide, _LAST)
        self.features = _Layers(
            _linear_conv(_LAST, _LAST, side, groups=_LAST),
            nn.Flatten(),
            nn.Linear(_LAST, embedding_dim, bias=False),
            Float32BatchNorm1d(embedding_dim),
        )
        self.num_tokens, self.dim = side * side, _LAST
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor, return_tokens: bool = False) -> Any:
        """Embeddings `[B, embedding_dim]`, or with `return_tokens` `(positions [B, N, 512], embeddings)`."""
        x = images.contiguous(memory_format=torch.channels_last)
        x = run_blocks(self._blocks(), x, self.checkpoint_blocks if self.training else "none", self.checkpoint_every)
        x = self.conv_sep(x)
        embedding = self.features(x)
        return (x.flatten(2).transpose(1, 2), embedding) if return_tokens else embedding

    def _blocks(self) -> list[nn.Module]:
        """The stages, those of residual blocks taken apart."""
        blocks: list[nn.Module] = []
        for stage in self.layers:
            parts = list(stage.get_submodule("layers").children())
            blocks += parts if getattr(parts[0], "adds_input", False) else [stage]
        return blocks

    def tokens(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(positions of the last feature map [B, N, 512], embeddings)`; positions are row-major."""
        return self(images, return_tokens=True)
