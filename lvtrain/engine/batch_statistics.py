"""BatchNorm's running statistics: one update a step, the same on every rank and for every number of ranks.

Without this, each rank would update its running statistics once for each of its own micro-batches. Ranks would differ,
and so would a run on another number of ranks. Here the statistics of all micro-batches of a step are averaged, in the
order of the micro-batches, and update the running statistics once at the end of the step, with the layer's momentum. In
training each micro-batch is normalised by its own statistics, as always.

How: the layers run with momentum 1, so a forward leaves the statistics of its batch in the buffers, where they are
collected. A layer that is called several times in one micro-batch contributes its last call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lvtrain.distributed.collectives import all_gather_rows, group_size


class BatchStatistics:
    """Keeps the true running statistics of `module`'s BatchNorm layers, which the buffers hold between steps.

    Call `collect(micro)` after the forward of this rank's micro-batch `micro`, and `commit` or `discard` at the end of
    the step.
    """

    def __init__(self, module: nn.Module, micro_batches: int) -> None:
        self._layers = [
            layer
            for layer in module.modules()
            if isinstance(layer, _BatchNorm) and layer.track_running_stats and layer.running_mean is not None
        ]
        self._momenta = [_momentum(layer) for layer in self._layers]
        self._true = [buffer.clone() for buffer in self._buffers()]
        self._counts = [int(_count(layer)) for layer in self._layers]
        self._micro_batches = micro_batches
        self._slots: torch.Tensor | None = None
        self._learning: tuple[bool, ...] = ()
        for layer in self._layers:
            layer.momentum = 1.0

    def _buffers(self) -> list[torch.Tensor]:
        return [
            buffer for layer in self._layers for buffer in (layer.running_mean, layer.running_var) if buffer is not None
        ]

    @torch.no_grad()
    def collect(self, micro: int) -> None:
        """Copies the batch statistics that the last forward left in the buffers."""
        if not self._layers or not any(layer.training for layer in self._layers):
            return
        buffers = self._buffers()
        if self._slots is None:
            total = sum(buffer.numel() for buffer in buffers)
            self._slots = torch.zeros(self._micro_batches, total, dtype=torch.float32, device=buffers[0].device)
        self._learning = tuple(layer.training for layer in self._layers)
        torch.cat([buffer.flatten() for buffer in buffers], out=self._slots[micro])

    @torch.no_grad()
    def commit(self) -> None:
        """Updates the running statistics once from all micro-batches of the step. A collective."""
        if self._slots is None or not any(self._learning):
            return
        slots = self._slots
        slots = all_gather_rows(slots, [len(slots)] * group_size())
        mean = slots[0].clone()  # summed one by one, so that the order does not depend on the number of ranks
        for row in slots[1:]:
            mean += row
        mean /= len(slots)
        for position, (true, batch) in enumerate(zip(self._true, mean.split([true.numel() for true in self._true]))):
            layer = position // 2
            if self._learning[layer]:
                true.lerp_(batch.view_as(true), self._momenta[layer])
                self._counts[layer] += position % 2
        self.discard()

    @torch.no_grad()
    def discard(self) -> None:
        """Restores the true statistics in the buffers, as if the step's micro-batches had not been seen."""
        for true, buffer in zip(self._true, self._buffers()):
            buffer.copy_(true)
        for count, layer in zip(self._counts, self._layers):
            _count(layer).fill_(count)

    @torch.no_grad()
    def reload(self) -> None:
        """Reads the true statistics from the buffers, after a checkpoint was loaded."""
        for true, buffer in zip(self._true, self._buffers()):
            true.copy_(buffer)
        self._counts = [int(_count(layer)) for layer in self._layers]

    def release(self) -> None:
        """Restores the momentum of the layers."""
        for layer, momentum in zip(self._layers, self._momenta):
            layer.momentum = momentum


def _count(layer: Any) -> torch.Tensor:
    return layer.num_batches_tracked


def _momentum(layer: _BatchNorm) -> float:
    if layer.momentum is None:
        raise ValueError(
            "BatchNorm with momentum=None (a cumulative average) has no meaning in an endless stream; give it a momentum"
        )
    return float(layer.momentum)
