"""Which rank holds which classes, and what their rows are at the start."""

from __future__ import annotations

import torch

from lvtrain import randomness

_INITIAL_BLOCK = 4096  # classes whose initial rows are drawn together


def class_range(num_classes: int, rank: int, ranks: int) -> tuple[int, int]:
    """The half-open range of global class ids rank `rank` of `ranks` holds: `[C*r//R, C*(r+1)//R)`.

    Ranges differ by at most one class, follow each other and cover `[0, num_classes)`; with more ranks than classes some are empty.
    """
    return num_classes * rank // ranks, num_classes * (rank + 1) // ranks


def initial_rows(rows: tuple[int, int], dim: int, seed: int) -> torch.Tensor:
    """Normal rows of deviation 0.01 (as arcface_torch), float32 [stop - start, dim]; a function of seed and class id, not of who holds it."""
    start, stop = rows
    result = torch.empty(stop - start, dim)
    generator = torch.Generator()
    for block in range(start // _INITIAL_BLOCK, -(-stop // _INITIAL_BLOCK)):
        generator.manual_seed(randomness.torch_seed(seed, "class-rows", block))
        drawn = torch.randn(_INITIAL_BLOCK, dim, generator=generator)
        first = block * _INITIAL_BLOCK
        low, high = max(start, first), min(stop, first + _INITIAL_BLOCK)
        torch.mul(drawn[low - first : high - first], 0.01, out=result[low - start : high - start])
    return result
