"""The landmark CNNs of Part fViT: MobileNetV3-large (arXiv 1905.02244, table 1) up to its 160 channels, timm's and LAFS's.

The parameter names of `ReleasedLandmarkFeatures` are those of LAFS's released code (`features.i.conv.j`), so the released
weights load as they are. It differs from timm's: squeeze-and-excite is before the activation, without bias, and exactly a
quarter as wide.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

# kernel, expanded width, width, squeeze-and-excite, hard-swish, stride
_BLOCKS = (
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)


class _SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width // 4
        linears = (nn.Linear(width, inner, bias=False), nn.ReLU(), nn.Linear(inner, width, bias=False))
        self.fc = nn.Sequential(*linears, nn.Hardsigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.fc(x.mean(dim=(2, 3)))[:, :, None, None]


class _Bottleneck(nn.Module):
    def __init__(self, width_in: int, kernel: int, expanded: int, width: int, squeeze: bool, swish: bool, stride: int):
        super().__init__()
        self.adds_input = stride == 1 and width_in == width
        activation = nn.Hardswish if swish else nn.ReLU
        self.conv = nn.Sequential(
            nn.Conv2d(width_in, expanded, 1, bias=False),
            nn.BatchNorm2d(expanded),
            activation(),
            nn.Conv2d(expanded, expanded, kernel, stride, kernel // 2, groups=expanded, bias=False),
            nn.BatchNorm2d(expanded),
            _SqueezeExcite(expanded) if squeeze else nn.Identity(),
            activation(),
            nn.Conv2d(expanded, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.adds_input else self.conv(x)


class ReleasedLandmarkFeatures(nn.Module):
    """`[B, 3, H, W]` -> the mean of its last feature map, `[B, 160]`."""

    num_features = 160

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        widths = [16, *(width for _, _, width, *_ in _BLOCKS)]
        blocks = [_Bottleneck(width_in, *block) for width_in, block in zip(widths, _BLOCKS)]
        self.features = nn.Sequential(stem, *blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # channels last halves the time of its depthwise convolutions on a CPU, and is what cuDNN needs
        return self.features(images.contiguous(memory_format=torch.channels_last)).mean(dim=(2, 3))


class LandmarkFeatures(nn.Module):
    """timm's MobileNetV3-large (arXiv 1905.02244) up to its 160 channels: `[B, 3, H, W]` -> their mean `[B, 160]`."""

    def __init__(self) -> None:
        super().__init__()
        network: Any = timm.create_model("mobilenetv3_large_100", pretrained=False, num_classes=0)
        self.conv_stem, self.bn1, self.blocks = network.conv_stem, network.bn1, network.blocks[:-1]
        self.num_features = 160

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # channels last halves the time of its depthwise convolutions on a CPU, and is what cuDNN needs
        images = images.contiguous(memory_format=torch.channels_last)
        return self.blocks(self.bn1(self.conv_stem(images))).mean(dim=(2, 3))
