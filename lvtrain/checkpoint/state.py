"""The two kinds of tensors a checkpoint knows: replicated ones and row shards.

Rooms hand their state out, and take it back, as `dict[str, Saved]` keyed by dotted names; `training.checkpoint` decides who writes what.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Replicated:
    """A tensor that is the same on every rank. On the meta device: this rank knows its shape and leaves the writing to others. `given`: a host
    copy that nobody else will change."""

    tensor: torch.Tensor
    given: bool = False


@dataclass(frozen=True)
class Rows:
    """This rank's rows `[start, start + len(tensor))` of a tensor of `total` rows that is split over the ranks along dim 0."""

    tensor: torch.Tensor
    start: int
    total: int

    @property
    def stop(self) -> int:
        return self.start + len(self.tensor)


Saved = Replicated | Rows
State = dict[str, Saved]
