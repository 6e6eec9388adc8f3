"""Which classes a rank holds, where their centres start, and which of them take part in a step.

All three are pure functions: they need no communication and no saved state, and do not depend on the number of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lvtrain import randomness
from lvtrain.distributed.world import to_device

_INITIAL_BLOCK = 4096  # classes whose first centres are drawn together
_SAMPLING = "class-sampling"
_HASHED = 1 << 16  # classes hashed at once: a few megabytes of float64, whatever the number of classes


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


def sampled_classes(
    seed: int, step: int, rows: tuple[int, int], rate: float, positives: Tensor, device: torch.device | str = "cpu"
) -> Tensor | None:
    """Negative class sub-sampling: the classes of this rank that take part in step `step`; None = all (rate 1).

    A class takes part if it is a positive of the global batch, or if hash(seed, step, class) < rate.

    The result is computed where `positives` are. On the host its length is known without asking the GPU, and the indices
    are copied from pinned memory: the host never waits. With positives on a GPU the host waits once. The hash takes
    about 20 ns per local class on one CPU core.

    Args:
        seed: of the run.
        step: number of the step.
        rows: this rank's half-open range of global classes.
        rate: share of the classes, in (0, 1].
        positives: int64 labels of the whole global batch, with repetitions, -1 ignored.
        device: where the result goes.

    Returns:
        Sorted distinct int64 indices relative to `rows[0]`.
    """
    if rate >= 1:
        return None
    chosen = _membership(seed, step, rows, rate, positives).nonzero().squeeze(1)
    return to_device(chosen, torch.device(device))


def _membership(seed: int, step: int, rows: tuple[int, int], rate: float, positives: Tensor) -> Tensor:
    """Which classes take part, bool [n_local]."""
    start, stop = rows
    n = stop - start
    # the last element takes the positives of other ranks
    member = torch.empty(n + 1, dtype=torch.bool, device=positives.device)
    for first in range(0, n, _HASHED):
        last = min(first + _HASHED, n)
        classes = torch.arange(start + first, start + last, device=positives.device)
        member[first:last] = randomness.torch_uniform(seed, _SAMPLING, step, classes) < rate
    local = positives - start
    local = torch.where((local >= 0) & (local < n), local, n)  # -1 (ignored) and other ranks' classes
    member[local] = True
    return member[:n]
