"""Patches of an image around points, differentiable in the points, with the same bits on every run."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_BILINEAR, _ZEROS = 0, 0  # torch's numbers of the interpolation and of the padding


def grid_landmarks(side: int, patch: int = 8) -> torch.Tensor:
    """Centres of a regular `side` x `side` grid of patches, `[side * side, 2]` float32 (x, y) in pixels, row-major.

    The centre of the image's first pixel is (0, 0), so the first patch of 8 pixels has its centre at 3.5.
    """
    centre = torch.arange(side, dtype=torch.float32) * patch + (patch - 1) / 2
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


def sample_patches(images: torch.Tensor, landmarks: torch.Tensor, patch: int = 8) -> torch.Tensor:
    """Bilinear patches around points, differentiable in both arguments. What lies outside the image is 0.

    Always in float32 (float64 for float64 images): in bfloat16 a patch would be off by up to half a pixel.

    Args:
        images: float `[B, 3, H, W]`.
        landmarks: float `[B, N, 2]`, (x, y) in pixels.
        patch: side of a patch, pixels.

    Returns:
        `[B, N, patch * patch * 3]`, in the order (row, column, colour).
    """
    dtype = torch.promote_types(images.dtype, torch.float32)
    batch, number = landmarks.shape[:2]
    # (width - 1, height - 1), made on the device: copying numbers from the host would make the host wait
    size = torch.linspace(images.shape[3] - 1, images.shape[2] - 1, 2, dtype=dtype, device=images.device)
    offset = torch.arange(patch, dtype=dtype, device=images.device) - (patch - 1) / 2
    y, x = torch.meshgrid(offset, offset, indexing="ij")
    points = landmarks.to(dtype)[:, :, None, None] + torch.stack([x, y], dim=-1)  # [B, N, patch, patch, 2]
    grid = (points / size * 2 - 1).reshape(batch, number * patch, patch, 2)
    with torch.autocast(images.device.type, enabled=False):
        sampled = _sampled(images.to(dtype), grid)
    return sampled.unflatten(2, (number, patch)).permute(0, 2, 3, 4, 1).reshape(batch, number, -1)


def _sampled(images: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    if images.requires_grad:
        return F.grid_sample(images, grid, padding_mode="zeros", align_corners=True)
    sampled: torch.Tensor = _SampleGrid.apply(images, grid)
    return sampled


class _SampleGrid(torch.autograd.Function):
    """`grid_sample` with a gradient for the grid alone, the same bits on every run.

    Under deterministic algorithms torch refuses the backward of `grid_sample` on CUDA, because it adds up the images'
    gradient in no fixed order. The grid's gradient is computed point by point, and images need none in training.
    """

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(images, grid)
        return torch.ops.aten.grid_sampler_2d(images, grid, _BILINEAR, _ZEROS, True)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, _grid_gradient(gradient, *ctx.saved_tensors)


# a custom operator, because torch.compile does not trace the switch of deterministic algorithms
@torch.library.custom_op("lvtrain::grid_gradient", mutates_args=())
def _grid_gradient(gradient: torch.Tensor, images: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        of_grid: torch.Tensor
        _, of_grid = torch.ops.aten.grid_sampler_2d_backward(
            gradient, images, grid, _BILINEAR, _ZEROS, True, [False, True]
        )
        return of_grid
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warns)


@_grid_gradient.register_fake
def _(gradient: torch.Tensor, images: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(grid)
