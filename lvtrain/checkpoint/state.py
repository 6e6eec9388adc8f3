"""The two kinds of tensors in a checkpoint: replicated ones, and those that are split by rows.

Rooms return their state, and take it back, as `dict[str, Saved]` by dotted names. `lvtrain.checkpoint.plan` decides which
rank writes what.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Replicated:
    """A tensor that is the same on every rank.

    Attributes:
        tensor: on the meta device where this rank only knows its shape and another rank writes it.
        given: it is a host copy that nobody else changes.
    """

    tensor: torch.Tensor
    given: bool = False


@dataclass(frozen=True)
class Rows:
    """This rank's rows `[start, start + len(tensor))` of a tensor that is split along dimension 0 and has `total` rows."""

    tensor: torch.Tensor
    start: int
    total: int

    @property
    def stop(self) -> int:
        return self.start + len(self.tensor)


Saved = Replicated | Rows
State = dict[str, Saved]
