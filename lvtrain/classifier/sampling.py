"""Negative class sub-sampling: which classes take part in a step.

As in Partial FC (An et al., CVPR 2022) and in PCO's S = C r, int(r C) of all C classes take part, the classes of the global
batch among them. Only where the batch alone has more classes do more take part.

The others are those that come first in a random order of all classes, drawn for the step. A class's place in that order is
a function of the class, and no two classes have the same place. So it is known without counting how many classes lie
before a place: each rank looks at its own classes only, and nothing is communicated.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lvtrain import randomness
from lvtrain.distributed.world import to_device

RULE = 2  # recorded in checkpoints; in rule 1 each class outside the batch took part with probability r
_PURPOSE = "class-order"
_ROUNDS = 8  # with 6, the sets of 2 or 3 among 9 classes are not quite equally frequent
_LARGEST_SIDE = 46_340  # its square fits int32
_BLOCK = 1 << 16  # classes looked at together, a few hundred kilobytes


def sampled_classes(
    seed: int,
    step: int,
    num_classes: int,
    rows: tuple[int, int],
    rate: float,
    positives: Tensor,
    device: torch.device | str = "cpu",
) -> Tensor | None:
    """The classes of this rank that take part in step `step`; None = all (rate 1).

    Over all ranks they are P positives and max(int(rate * num_classes) - P, 0) of the other classes. Every set of others
    is equally likely. The same classes are chosen on any number of ranks.

    The result is computed where `positives` are. On the host its length is known without asking the GPU, and the indices
    are copied from pinned memory: the host never waits. With positives on a GPU the host waits. One CPU core needs about
    20 ns per local class.

    Args:
        seed: of the run.
        step: number of the step.
        num_classes: C, over all ranks.
        rows: this rank's half-open range of global classes.
        rate: share of the classes, in (0, 1].
        positives: int64 labels of the whole global batch, with repetitions; -1 is ignored.
        device: where the result goes.

    Returns:
        Sorted distinct int64 indices relative to `rows[0]`.
    """
    if rate >= 1:
        return None
    start, stop = rows
    own = positives[(positives >= 0) & (positives < num_classes)].unique()
    others = max(int(rate * num_classes) - len(own), 0)
    order = ClassOrder(seed, step, num_classes, own.device)
    limit = _limit(order.places(own), others)
    member = torch.empty(stop - start, dtype=torch.bool, device=own.device)
    for first in range(start, stop, _BLOCK):
        last = min(first + _BLOCK, stop)
        classes = torch.arange(first, last, device=own.device)
        member[first - start : last - start] = order.places(classes) < limit
    member[own[(own >= start) & (own < stop)] - start] = True
    return to_device(member.nonzero().squeeze(1), torch.device(device))


def _limit(places: Tensor, others: int) -> int:
    """The place before which exactly `others` classes lie that are not in the batch.

    Args:
        places: int [P], distinct, of the batch's classes.
        others: up to the number of classes that are not in the batch.
    """
    ascending = places.sort().values
    before = ascending - torch.arange(
        len(places), device=places.device
    )  # classes that are not in the batch, before each
    return others + int((before < others).sum())


class ClassOrder:
    """A random order of the classes `[0, num_classes)`, drawn for one step of a run.

    It is a Feistel network of 8 rounds, whose round functions are drawn anew for every step, on the smallest square with a
    cell for every class. A class that lands on a cell beyond the classes goes through again until it lands on one of them
    (Black, Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). Its integers are the same on every device.

    Args:
        seed: of the run.
        step: number of the step.
        num_classes: C, up to 2.1 billion.
        device: of the classes that `places` is given.

    Raises:
        ValueError: more classes than that.
    """

    def __init__(self, seed: int, step: int, num_classes: int, device: torch.device) -> None:
        self.num_classes, self.side = num_classes, math.isqrt(num_classes - 1) + 1
        if self.side > _LARGEST_SIDE:
            raise ValueError(f"{num_classes} classes, where sampling supports {_LARGEST_SIDE**2}")
        drawn = randomness.bits(seed, _PURPOSE, step, np.arange(_ROUNDS * self.side)) % np.uint64(self.side)
        rounds = torch.from_numpy(drawn.astype(np.int32).reshape(_ROUNDS, self.side))
        self._rounds = to_device(rounds - self.side, device)  # so that a sum is negative where it does not wrap around

    def places(self, classes: Tensor) -> Tensor:
        """The place of each class, int32 [n], in `[0, num_classes)`; classes: int64 [n]."""
        places = self._permuted(classes.to(torch.int32))
        while len(beyond := (places >= self.num_classes).nonzero().squeeze(1)):
            places[beyond] = self._permuted(places[beyond])
        return places

    def _permuted(self, cells: Tensor) -> Tensor:
        """A permutation of the square's cells, int32 [n]. One round: (a, b) becomes (b, a + f(b) mod side)."""
        a = torch.div(cells, self.side, rounding_mode="floor")
        b = cells - a * self.side
        for function in self._rounds:
            a += function.index_select(0, b)
            a += (a >> 31) & self.side  # negative: the sum has not reached `side`
            a, b = b, a
        return a * self.side + b
