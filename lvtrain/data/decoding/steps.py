"""Applies the steps of `augment.step_draws` to a batch, on any device: one operation at a time to all samples that have it.

The arithmetic is torchvision's on uint8 tensors. Where torchvision takes one factor for a whole batch, there is one for
each sample here. Geometry is Pillow's: timm's RandAugment works on Pillow images.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lvtrain.data.augment.step_draws import NAMES

_GREY = 128


def apply_steps(images: Tensor, steps: np.ndarray | None, black: np.ndarray | None = None) -> Tensor:
    """Images uint8 [m, 3, h, w] after their steps float32 [m, n, 3], and with black rectangles [m, 4] (shares; width 0: none).

    The host knows which samples have which step, so it never waits for the device.
    """
    if steps is not None:
        images = images.clone()
        for turn in steps.transpose(1, 0, 2):
            for code in np.unique(turn[:, 0]).astype(int):
                name = NAMES[code]
                for cubic in (False, True):
                    rows = np.flatnonzero((turn[:, 0] == code) & ((turn[:, 2] > 0) == cubic))
                    if name == "none" or not len(rows):
                        continue
                    place = torch.from_numpy(rows).to(images.device)
                    amount = torch.from_numpy(turn[rows, 1].copy()).to(images.device)
                    images[place] = _step(name, images[place], amount, cubic)
    return images if black is None else _blacken(images, black)


def _step(name: str, images: Tensor, amount: Tensor, cubic: bool) -> Tensor:
    from torchvision.transforms.v2 import functional

    factor = amount.view(-1, 1, 1, 1)
    if name == "brightness":
        return (images * factor).clamp(0, 255).to(torch.uint8)
    if name == "contrast":
        return _blend(images, _grey(images).mean(dim=(1, 2, 3), keepdim=True), factor)
    if name == "saturation":
        return _blend(images, _grey(images), factor)
    if name == "hue":
        return _turn_hue(images, factor[:, :, :, 0])
    if name == "sharpness":
        return _blend(images, functional.adjust_sharpness(images, 0.0), factor)
    if name == "posterise":
        return images & (256 - torch.pow(2, 8 - factor)).to(torch.uint8)
    if name == "solarise":
        return torch.where(images >= factor, 255 - images, images)
    if name == "blur":
        return _blur(images, amount)
    if name in ("autocontrast", "equalise", "invert"):
        function = {"equalise": functional.equalize}.get(name) or getattr(functional, name)
        result: Tensor = function(images)
        return result
    return _warp(name, images, amount, cubic)


def _grey(images: Tensor) -> Tensor:
    """Luminance float32 [m, 1, h, w], whole numbers."""
    weights = torch.tensor([0.2989, 0.587, 0.114], device=images.device).view(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True).floor()


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (images * factor + other * (1 - factor)).clamp(0, 255).to(torch.uint8)


def _turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """The hue of HSV plus a share of a full turn, [m, 1, 1]."""
    x = images.to(torch.float32) / 255
    high, low = x.amax(dim=1), x.amin(dim=1)
    chroma = high - low
    safe = torch.where(chroma > 0, chroma, 1.0)
    r, g, b = x.unbind(1)
    hue = torch.where(
        high == r, (g - b) / safe, torch.where(high == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    )  # in sixths of a turn
    hue = torch.where(chroma > 0, hue, 0.0) + 6 * turn
    planes = []
    for n in (5, 3, 1):
        k = torch.remainder(n + hue, 6)
        planes.append(high - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return (torch.stack(planes, dim=1) * 255.999).clamp(0, 255).to(torch.uint8)


def _blur(images: Tensor, sigma: Tensor) -> Tensor:
    m, _, h, w = images.shape
    reach = math.ceil(3 * 2.0)
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=torch.float32)
    kernel = torch.exp(-offsets.square() / (2 * sigma.view(-1, 1).square()))
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(3, dim=0)
    x = F.pad(images.to(torch.float32), [reach] * 4, mode="reflect").view(1, 3 * m, h + 2 * reach, w + 2 * reach)
    x = F.conv2d(x, kernel.view(3 * m, 1, 1, -1), groups=3 * m)
    x = F.conv2d(x, kernel.view(3 * m, 1, -1, 1), groups=3 * m)
    return x.view(m, 3, h, w).round().clamp(0, 255).to(torch.uint8)


def _warp(name: str, images: Tensor, amount: Tensor, cubic: bool) -> Tensor:
    """Pillow's affine transforms: a rotation about the middle, shears from the corner; mid-grey outside."""
    m, _, h, w = images.shape
    theta = torch.eye(2, 3, device=images.device).repeat(m, 1, 1)  # in units of half the side, origin in the middle
    if name == "rotate":
        angle = torch.deg2rad(amount)
        theta[:, 0, 0] = theta[:, 1, 1] = torch.cos(angle)
        theta[:, 0, 1], theta[:, 1, 0] = -torch.sin(angle), torch.sin(angle)
    elif name.startswith("translate"):
        theta[:, 0 if name.endswith("x") else 1, 2] = 2 * amount
    else:  # x = x + factor y, counted from the upper left corner
        row = 0 if name.endswith("x") else 1
        theta[:, row, 1 - row] = amount
        theta[:, row, 2] = amount
    grid = F.affine_grid(theta, [m, 3, h, w], align_corners=False)
    inside = (grid.abs() < 1).all(dim=-1).unsqueeze(1)
    mode = "bicubic" if cubic else "bilinear"
    x = F.grid_sample(images.to(torch.float32), grid, mode=mode, padding_mode="border", align_corners=False)
    return torch.where(inside, x.round().clamp(0, 255), float(_GREY)).to(torch.uint8)


def _blacken(images: Tensor, boxes: np.ndarray) -> Tensor:
    h, w = images.shape[2:]
    size = np.array([w, h, w, h], dtype=np.float32)
    x, y, width, height = (
        torch.from_numpy(edge).to(images.device).view(-1, 1, 1, 1) for edge in np.rint(boxes * size).T.copy()
    )
    across = torch.arange(w, device=images.device).view(1, 1, 1, -1)
    down = torch.arange(h, device=images.device).view(1, 1, -1, 1)
    inside = (across >= x) & (across < x + width) & (down >= y) & (down < y + height)
    return images.masked_fill(inside, 0)
