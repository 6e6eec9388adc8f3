"""MobileNet (v1, arXiv 1704.04861) for faces, as insightface's MXNet code trained it: OpenCV's SFace is one.

Thirteen depthwise separable convolutions, each half followed by BatchNorm and PReLU. The first convolution keeps the size, so a
112 x 112 image ends as 7 x 7. BatchNorm, dropout, a linear layer over all positions and a last BatchNorm give the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import PositiveInt
from torch import nn

from lvtrain.backbones.base import Backbone, count_blocks
from lvtrain.backbones.layers import Float32BatchNorm1d, Float32BatchNorm2d
from lvtrain.backbones.memory import Share
from lvtrain.backbones.registry import published_sizes, register

_FIRST = 32
_WIDTHS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


def _conv(width_in: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(width_in, width, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, Float32BatchNorm2d(width), nn.PReLU(width)]


@register("mobilenet", scale=32)
class MobileNet(Backbone):
    """`[B, 3, image_size, image_size]` float -> `[B, embedding_dim]` float32, not normalised.

    Args:
        scale: width of the first convolution; all widths grow with it. 32 is the paper's.
        dropout: before the linear layer.
    """

    first_names = ("stem.",)
    undecayed = ()

    def __init__(self, *, scale: PositiveInt, dropout: Share = 0.0, **backbone: Any) -> None:
        super().__init__(**backbone)
        width, side = scale, self.image_size
        self.stem = nn.Sequential(*_conv(3, width, 3))
        blocks = []
        for paper, stride in zip(_WIDTHS, _STRIDES):
            wider = paper * scale // _FIRST
            blocks.append(nn.Sequential(*_conv(width, width, 3, stride, width), *_conv(width, wider, 1)))
            width, side = wider, -(-side // stride)
        self.blocks = nn.ModuleList(blocks)
        self.norm = Float32BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width * side * side, self.embedding_dim)
        self.features = Float32BatchNorm1d(self.embedding_dim)
        self.num_tokens, self.dim = side * side, width
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor, return_tokens: bool = False) -> Any:
        """Embeddings `[B, embedding_dim]`, or with `return_tokens` `(positions [B, N, dim], embeddings)`."""
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        x = self.norm(self.run_blocks(self.blocks, x))
        embedding = self.features(self.fc(self.dropout(x.flatten(1))))
        return (x.flatten(2).transpose(1, 2), embedding) if return_tokens else embedding

    @classmethod
    def recognise(cls, state: Mapping[str, torch.Tensor], *, heads: int | None = None) -> dict[str, Any] | None:
        if not {"stem.0.weight", "blocks.12.3.weight", "fc.weight"} <= state.keys():
            return None
        if count_blocks(state, r"blocks\.(\d+)\.") != len(_WIDTHS):
            return None
        scale, width = state["stem.0.weight"].shape[0], state["norm.weight"].shape[0]
        embedding_dim, features = state["fc.weight"].shape
        side = round((features / width) ** 0.5)
        found = {"embedding_dim": embedding_dim, "image_size": 16 * side}
        published = next((name for name, size in published_sizes(cls).items() if size == {"scale": scale}), None)
        return {"name": published, **found} if published else {"name": "mobilenet", **found, "scale": scale}
