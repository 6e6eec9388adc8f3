"""Which classes a rank holds, and where their centres start.

Both are pure functions: they need no communication and no saved state, and do not depend on the number of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lvtrain import randomness

_INITIAL_BLOCK = 4096  # classes whose first centres are drawn together


def class_range(num_classes: int, rank: int, ranks: int) -> tuple[int, int]:
    """The half-open range of global class ids that rank `rank` of `ranks` holds: `[C*r//R, C*(r+1)//R)`.

    Ranges differ by at most one class, follow each other and cover `[0, num_classes)`. With more ranks than classes some
    are empty.
    """
    return num_classes * rank // ranks, num_classes * (rank + 1) // ranks


def initial_centres(rows: tuple[int, int], dim: int, seed: int) -> Tensor:
    """The first class centres of the global classes `rows`: float32 [stop - start, dim].

    Normal with standard deviation 0.01, as in arcface_torch; a function of the seed and the class id.
    """
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
