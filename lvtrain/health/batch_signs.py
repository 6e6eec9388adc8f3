"""Signs of the images of the first micro-batch of each step. They are summed on the device and read with the log line."""

from __future__ import annotations

import torch
from torch.nn import functional

_SIDE = 8  # of a thumbnail, in pixels
_CONSTANT = 0.01  # largest standard deviation of a constant image's thumbnail; one grey level is 0.008
_GREY = 0.02  # largest difference between the channels of an image without colour
_SAME = 1e-6  # two thumbnails whose projections differ by less are one image

NAMES = (
    "images",
    "constant",
    "grey",
    "copies",
    "same_pairs",
    "same_pixels",
    "same_pixels_square",
    "other_pairs",
    "other_pixels",
    "other_pixels_square",
)


def thumbnails(images: torch.Tensor) -> torch.Tensor:
    """[m, 3, H, W] -> float32 [m, 3, 8, 8]: means of 2 x 2 pixels of a grid that a mirror image shares.

    Reading every pixel would take longer than all other signs together.
    """
    size = images.shape[-1]
    step = max(1, (size - 1) // (2 * _SIDE - 1))
    step -= (size - 1 - step) % 2 if step > 1 else 0
    first = (size - 1 - step * (2 * _SIDE - 1)) // 2
    grid = images[..., first::step, first::step][..., : 2 * _SIDE, : 2 * _SIDE]
    return functional.adaptive_avg_pool2d(grid.float(), _SIDE)


class BatchSigns:
    """Sums over micro-batches of this rank. Nothing waits for the device except `read`.

    Args:
        device: of the images.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(NAMES), dtype=torch.float64, device=device)
        self.device = device
        self.pixels: torch.Tensor | None = None
        # uneven weights, so that different thumbnails have different projections
        self.weights = (torch.arange(3 * _SIDE * _SIDE, device=device) * 0.618034 % 1.0 - 0.5).view(3, _SIDE, _SIDE)

    @torch.no_grad()
    def add(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Adds a micro-batch.

        Args:
            images: float [m, 3, H, W] as the network gets them.
            labels: int64 [m], -1 is an image that could not be decoded.
        """
        valid = (labels >= 0).to(torch.float32)
        thumbs = thumbnails(images)
        upright = thumbs + thumbs.flip(-1)  # the same for an image and its mirror image
        constant = (thumbs.flatten(1).std(dim=1) < _CONSTANT).float() * valid
        grey = ((thumbs.amax(dim=1) - thumbs.amin(dim=1)).flatten(1).amax(dim=1) < _GREY).float() * valid
        keys = (upright * self.weights).flatten(1).sum(dim=1).sort().values
        close = keys.diff() < _SAME
        nobody = close.new_zeros(1)
        copies = (torch.cat([close, nobody]) | torch.cat([nobody, close])).float()

        pixels = upright.flatten(1)
        pixels = functional.normalize(pixels - pixels.mean(dim=0))
        order = labels.argsort()
        same = (labels[order][1:] == labels[order][:-1]) & (labels[order][1:] >= 0)
        other = (labels[1:] != labels[:-1]) & (labels[1:] >= 0) & (labels[:-1] >= 0)
        of_same = (pixels[order][1:] * pixels[order][:-1]).sum(dim=1) * same
        of_other = (pixels[1:] * pixels[:-1]).sum(dim=1) * other
        found = (
            valid.sum(),
            constant.sum(),
            (grey * (1 - constant)).sum(),
            copies.sum(),
            same.sum(),
            of_same.sum(),
            of_same.square().sum(),
            other.sum(),
            of_other.sum(),
            of_other.square().sum(),
        )
        self.sums += torch.stack([value.to(torch.float64) for value in found])

    @torch.no_grad()
    def look_closely(self, images: torch.Tensor) -> None:
        """Measures the range of the pixels of a few images."""
        self.pixels = torch.stack(images[:16].float().aminmax())

    def read(self) -> dict[str, float]:
        """The sums since the last `read`, which waits for the device."""
        found = dict(zip(NAMES, self.sums.tolist()))
        if self.pixels is not None:
            found |= dict(zip(("lowest", "highest"), self.pixels.tolist()))
        self.sums.zero_()
        return found
