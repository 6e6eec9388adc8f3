"""IResNet-18/34/50/100/200 of insightface's arcface_torch, with its parameter names: its weights load as they are.

A residual block is BatchNorm, conv, BatchNorm, PReLU, conv, BatchNorm (ArcFace, arXiv 1801.07698). There is no pooling: a
linear layer takes all positions, and a last BatchNorm, whose weight is held at 1, gives the embedding.
`first_shortcut="subsample"` is the variant of AdaFace and CVLface (their IR-18, -34, -50, -101).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import nn

from lvtrain.backbones.base import Backbone, count_blocks
from lvtrain.backbones.layers import Float32BatchNorm1d, Float32BatchNorm2d
from lvtrain.backbones.memory import Share
from lvtrain.backbones.registry import published_sizes, register
from lvtrain.errors import UserError

_WIDTHS = (64, 128, 256, 512)
_EPS = 1e-5


class _Block(nn.Module):
    """The first block of a layer halves the image and projects its input; the others add their input as it is."""

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


@register("iresnet18", layers=(2, 2, 2, 2))
@register("iresnet34", layers=(3, 4, 6, 3))
@register("iresnet50", layers=(3, 4, 14, 3))
@register("iresnet100", layers=(3, 13, 30, 3))
@register("iresnet200", layers=(6, 26, 60, 6))
class IResNet(Backbone):
    """`[B, 3, image_size, image_size]` float -> `[B, embedding_dim]` float32, not normalised.

    Args:
        layers: blocks in each of the four layers.
        dropout: before the last linear layer. arcface_torch has 0 for large data, 0.4 for small.
        first_shortcut: how the first block, which keeps the width, brings its input to half the size: `project` (1x1
            convolution and BatchNorm, arcface_torch) or `subsample` (every other pixel).
    """

    first_names = ("conv1.", "bn1.", "prelu.")
    undecayed = ()

    def __init__(
        self,
        *,
        layers: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt],
        dropout: Share = 0.0,
        first_shortcut: Literal["project", "subsample"] = "project",
        **backbone: Any,
    ) -> None:
        super().__init__(**backbone)
        embedding_dim, image_size = self.embedding_dim, self.image_size
        self.layers = layers
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
        self.features.weight.requires_grad = False  # held at 1, as in arcface_torch
        self.num_tokens, self.dim = side * side, width_in
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    def forward(self, images: torch.Tensor, return_tokens: bool = False) -> Any:
        """Embeddings `[B, embedding_dim]`, or with `return_tokens` `(positions [B, N, 512], embeddings)`."""
        x = self.prelu(self.bn1(self.conv1(images.contiguous(memory_format=torch.channels_last))))
        blocks = [block for number in range(1, 5) for block in self.get_submodule(f"layer{number}").children()]
        x = self.bn2(self.run_blocks(blocks, x))
        embedding = self.features(self.fc(self.dropout(x.flatten(1))))
        return (x.flatten(2).transpose(1, 2), embedding) if return_tokens else embedding

    def _block(self, name: str) -> int:
        match = re.match(r"layer(\d)\.(\d+)\.", name)  # the blocks are counted through the four layers
        return sum(self.layers[: int(match[1]) - 1]) + int(match[2]) + 1 if match else 0

    @classmethod
    def recognise(cls, state: Mapping[str, torch.Tensor], *, heads: int | None = None) -> dict[str, Any] | None:
        if not {"layer1.0.bn1.weight", "fc.weight"} <= state.keys():
            return None
        layers = tuple(count_blocks(state, rf"layer{i}\.(\d+)\.") for i in (1, 2, 3, 4))
        for name, size in published_sizes(cls).items():
            if size["layers"] == layers:
                projects = "layer1.0.downsample.0.weight" in state
                return {
                    "name": name,
                    "embedding_dim": state["fc.weight"].shape[0],
                    "image_size": math.isqrt(state["fc.weight"].shape[1] // _WIDTHS[-1]) * 16,
                    **({} if projects else {"first_shortcut": "subsample"}),
                }
        known = ", ".join(f"{name} {size['layers']}" for name, size in published_sizes(cls).items())
        raise UserError(f"an IResNet with {layers} blocks; known are {known}")
