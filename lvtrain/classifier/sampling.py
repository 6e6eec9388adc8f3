"""Negative class sub-sampling (NCS): which classes take part in a step.

Class j takes part in step t if it is a positive of the global batch, or if hash(seed, t, j) < r. That is a pure
function of (seed, t, j): it does not depend on the number of ranks, needs no communication and no saved state, and
every rank evaluates it for its own rows only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lvtrain.randomness import torch_uniform

_PURPOSE = "class-sampling"
_CHUNK = (
    1 << 16
)  # classes hashed at once: bounds the float64 temporaries to a few megabytes whatever the number of classes


def _membership(
    seed: int, step: int, rows: tuple[int, int], rate: float, positives: Tensor, device: torch.device
) -> Tensor:
    """[n_local] bool: the rows that take part."""
    start, stop = rows
    n = stop - start
    member = torch.empty(
        n + 1, dtype=torch.bool, device=device
    )  # the last element takes the positives that live elsewhere
    for first in range(0, n, _CHUNK):
        last = min(first + _CHUNK, n)
        classes = torch.arange(start + first, start + last, device=device)
        member[first:last] = torch_uniform(seed, _PURPOSE, step, classes) < rate
    local = positives.to(device) - start
    local = torch.where((local >= 0) & (local < n), local, n)  # -1 (ignored) and other ranks' classes
    member[local] = True
    return member[:n]


def chosen_rows(
    seed: int, step: int, rows: tuple[int, int], rate: float, positives: Tensor, device: torch.device | str = "cpu"
) -> Tensor | None:
    """The local rows that take part in a step, or None when all do (rate 1).

    rows: this rank's half-open range of global classes. positives: int64 tensor of global labels of the whole global
    batch, any shape of repetition, -1 ignored. Returns sorted int64 indices relative to `rows[0]`, unique, on `device`.
    On CUDA the unknown length costs one host synchronisation; `chosen_rows_padded` has none.
    """
    if rate >= 1:
        return None
    return _membership(seed, step, rows, rate, positives, torch.device(device)).nonzero().squeeze(1)


def capacity(num_rows: int, rate: float, num_positives: int) -> int:
    """A number of chosen rows that is exceeded with a probability below 1e-9: mean + 6.5 standard deviations + all
    positives.
    """
    expected = num_rows * rate
    return min(num_rows, math.ceil(expected + 6.5 * math.sqrt(expected * (1 - rate)) + 8) + num_positives)


def chosen_rows_padded(
    seed: int, step: int, rows: tuple[int, int], rate: float, positives: Tensor, device: torch.device | str = "cpu"
) -> Tensor | None:
    """As `chosen_rows` but of a fixed length, `capacity(n, rate, len(positives))`, padded with -1 at the end; no host
    synchronisation.

    In the improbable case of more members than the capacity, the highest class ids are left out.
    """
    if rate >= 1:
        return None
    member = _membership(seed, step, rows, rate, positives, torch.device(device))
    return torch.nonzero_static(member, size=capacity(len(member), rate, positives.numel()), fill_value=-1).squeeze(1)
