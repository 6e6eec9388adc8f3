"""Sampling patches at landmarks: one `grid_sample` for all of them, against a loop with one call per landmark."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lvtrain.backbones.landmarks.patches import grid_landmarks, sample_patches
from tools.benchmarks.measure import describe, machine_rates, pick_device, timed

SMALL = {"batch": 4, "repeats": 3}


def looped(images: torch.Tensor, landmarks: torch.Tensor, patch: int) -> torch.Tensor:
    """The same patches as `sample_patches`, one landmark after the other."""
    size = torch.tensor([images.shape[3] - 1, images.shape[2] - 1], device=images.device)
    offset = torch.arange(patch, device=images.device) - (patch - 1) / 2
    y, x = torch.meshgrid(offset, offset, indexing="ij")
    window = torch.stack([x, y], dim=-1)
    found = []
    for number in range(landmarks.shape[1]):
        grid = (landmarks[:, number, None, None] + window) / size * 2 - 1
        found.append(
            F.grid_sample(images, grid, padding_mode="zeros", align_corners=True).permute(0, 2, 3, 1).flatten(1)
        )
    return torch.stack(found, dim=1)


def run(batch: int = 32, side: int = 14, patch: int = 8, device: str = "auto", repeats: int = 9) -> dict[str, Any]:
    """Milliseconds of forward, and of forward and backward (to images and landmarks), for `side`^2 landmarks.

    Also the difference between the two ways. `bound_ms` is the time to read the pixels and write the patches once, at the
    measured copy rate.
    """
    place = pick_device(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, side * patch, side * patch, generator=generator).to(place).requires_grad_()
    landmarks = grid_landmarks(side, patch).expand(batch, -1, -1) + 2 * torch.randn(
        batch, side * side, 2, generator=generator
    )
    landmarks = landmarks.to(place).requires_grad_()
    ways = {
        "one_call": lambda: sample_patches(images, landmarks, patch),
        "loop": lambda: looped(images, landmarks, patch),
    }
    times: dict[str, Any] = {}
    gradients = {}
    for name, way in ways.items():
        with torch.no_grad():
            forward = timed(way, place, repeats)
        weight = torch.randn(way().shape, generator=torch.Generator().manual_seed(1)).to(place)

        def both(way: Any = way, weight: torch.Tensor = weight) -> Any:
            return torch.autograd.grad(way(), (images, landmarks), weight)

        times[name] = {
            "forward_ms": round(1e3 * forward, 2),
            "forward_backward_ms": round(1e3 * timed(both, place, repeats), 2),
        }
        gradients[name] = both()
    rates = machine_rates(place, "float32")
    moved = 4 * (images.numel() + batch * side * side * patch * patch * 3)
    return {
        "subject": "patches",
        "device": describe(place),
        "batch": batch,
        "landmarks": side * side,
        "patch": patch,
        **times,
        "forward_speedup": round(times["loop"]["forward_ms"] / times["one_call"]["forward_ms"], 2),
        "forward_backward_speedup": round(
            times["loop"]["forward_backward_ms"] / times["one_call"]["forward_backward_ms"], 2
        ),
        "bound_ms": round(1e3 * moved / (rates["copy_gb_per_second"] * 1e9), 3),
        "largest_difference": float((ways["one_call"]() - ways["loop"]()).detach().abs().max()),
        "largest_gradient_difference": max(float((a - b).abs().max()) for a, b in zip(*gradients.values())),
    }
