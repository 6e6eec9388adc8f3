"""Negative class sub-sampling (NCS): which classes take part in a step.

Class j takes part in step t if it is a positive of the global batch, or if hash(seed, t, j) < r. That is a pure
function of (seed, t, j): it does not depend on the number of ranks, needs no communication and no saved state, and
every rank evaluates it for its own rows only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lvtrain.distributed.world import to_device
from lvtrain.randomness import torch_uniform

_PURPOSE = "class-sampling"
_CHUNK = (
    1 << 16
)  # classes hashed at once: bounds the float64 temporaries to a few megabytes whatever the number of classes


def _membership(seed: int, step: int, rows: tuple[int, int], rate: float, positives: Tensor) -> Tensor:
    """[n_local] bool: the rows that take part."""
    start, stop = rows
    n = stop - start
    # the last element takes the positives that live elsewhere
    member = torch.empty(n + 1, dtype=torch.bool, device=positives.device)
    for first in range(0, n, _CHUNK):
        last = min(first + _CHUNK, n)
        classes = torch.arange(start + first, start + last, device=positives.device)
        member[first:last] = torch_uniform(seed, _PURPOSE, step, classes) < rate
    local = positives - start
    local = torch.where((local >= 0) & (local < n), local, n)  # -1 (ignored) and other ranks' classes
    member[local] = True
    return member[:n]


def chosen_rows(
    seed: int, step: int, rows: tuple[int, int], rate: float, positives: Tensor, device: torch.device | str = "cpu"
) -> Tensor | None:
    """The local rows that take part in a step, or None when all do (rate 1).

    rows: this rank's half-open range of global classes. positives: int64 tensor of global labels of the whole global
    batch, any shape of repetition, -1 ignored. Returns sorted int64 indices relative to `rows[0]`, unique, on `device`.

    Computed where `positives` are. Given on the host, as the data order knows them, the length is known without asking
    the GPU: the indices are copied there from pinned memory and the host never waits. Positives on a GPU cost one host
    synchronisation. The hash takes about 20 ns a local row on one CPU core.
    """
    if rate >= 1:
        return None
    chosen = _membership(seed, step, rows, rate, positives).nonzero().squeeze(1)
    return to_device(chosen, torch.device(device))
