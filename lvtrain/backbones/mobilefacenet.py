"""MobileFaceNet (arXiv 1804.07573) as arcface_torch trains it, with its parameter names.

So weights of its `mbf` and `mbf_large` load unchanged. Weights of other networks of this kind show their sizes.

A block widens by a 1x1 convolution, filters by a depthwise 3x3 one, and narrows by a linear 1x1 one. A depthwise
convolution as large as the last feature map weighs its positions, and a linear layer gives the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import PositiveInt
from torch import nn

from lvtrain.backbones.base import Backbone, count_blocks
from lvtrain.backbones.layers import Float32BatchNorm1d, Float32BatchNorm2d
from lvtrain.backbones.registry import published_sizes, register

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


@register("mobilefacenet", blocks=(1, 4, 6, 2), scale=2)
@register("mobilefacenet_large", blocks=(2, 8, 12, 4), scale=4)
class MobileFaceNet(Backbone):
    """`[B, 3, image_size, image_size]` float -> `[B, embedding_dim]` float32, not normalised.

    Args:
        blocks: residual blocks of the four stages; a first stage of 1 is a grouped convolution, as in the paper.
        scale: factor on the widths; the depthwise convolutions keep the paper's (128, 256, 512), as in arcface_torch.
    """

    block_names = r"layers\.(\d+)\."  # a stage of residual blocks counts as one
    first_names = ()
    undecayed = ()

    def __init__(
        self, *, blocks: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt], scale: PositiveInt, **backbone: Any
    ) -> None:
        super().__init__(**backbone)
        embedding_dim, image_size = self.embedding_dim, self.image_size
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
        x = self.run_blocks(self._blocks(), x)
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

    @classmethod
    def recognise(cls, state: Mapping[str, torch.Tensor], *, heads: int | None = None) -> dict[str, Any] | None:
        if not {"conv_sep.layers.0.weight", "features.layers.2.weight"} <= state.keys():
            return None
        residual = (
            "layers.1.layers.0.layers.0.layers.0.weight" in state
        )  # else the first stage is a grouped convolution
        first = count_blocks(state, r"layers\.1\.layers\.(\d+)\.") if residual else 1
        shape = {
            "blocks": (first, *(count_blocks(state, rf"layers\.{i}\.layers\.(\d+)\.layers\.") for i in (3, 5, 7))),
            "scale": state["layers.0.layers.0.weight"].shape[0] // 64,
        }
        found = {
            "embedding_dim": state["features.layers.2.weight"].shape[0],
            "image_size": 16 * state["features.layers.0.layers.0.weight"].shape[-1],
        }
        published = next((name for name, size in published_sizes(cls).items() if size == shape), None)
        return {"name": published, **found} if published else {"name": "mobilefacenet", **found, **shape}
