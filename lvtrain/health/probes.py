"""Signs of gradients and of what moves: measured in the last step before a log line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_ELEMENTS = 64  # of each weight, whose movement is measured
_ROWS = 64  # class centres of this rank that are watched
_DTYPE = torch.float32  # of norms
_LAYER = 16  # a layer with fewer rows says nothing of dead units


def _some(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """A copy of at most `count` evenly spaced elements, float32."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // count)][:count].float().clone()


def _held(parameter: nn.Parameter) -> torch.Tensor:
    """What this rank has of a weight: all of it, or its part under ZeRO-3."""
    part: torch.Tensor = getattr(parameter, "ds_tensor", parameter)
    return part


class Movement:
    """How far weights and class centres move in a step.

    Args:
        parameters: of the backbone, by name.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.parameters = [(name, parameter) for name, parameter in parameters]
        self.before: list[torch.Tensor] | None = None

    def begin(self) -> None:
        self.before = [_some(_held(parameter), _ELEMENTS) for _, parameter in self.parameters]

    def end(self) -> torch.Tensor:
        """What the step did to the weights, float32 [3].

        The share of the weights that moved, the root mean square of their movement, and the share of their length that
        matrices lost.
        """
        assert self.before is not None
        moved, square, total, along, length = [], [], [], [], []
        for (_, parameter), before in zip(self.parameters, self.before):
            if not before.numel():
                continue
            change = _some(_held(parameter), _ELEMENTS) - before
            if len(getattr(parameter, "ds_shape", parameter.shape)) > 1:
                along.append((change * before).mean())
                length.append(before.square().mean())
            change = change.abs()
            size = float(_held(parameter).numel())
            moved.append((change > 0).float().mean() * size)
            square.append(change.square().mean() * size)
            total.append(size)
        self.before = None
        every = sum(total) or 1.0
        device = moved[0].device
        share = torch.stack(moved).sum() / every
        rms = (torch.stack(square).sum() / every / share.clamp_min(1e-12)).sqrt()
        shrink = -torch.stack(along).sum() / torch.stack(length).sum().clamp_min(1e-30) if along else share * 0
        return torch.stack([share, rms, shrink]).to(device)


class Gradients:
    """Gradients of one step on this rank, before they are averaged over the ranks.

    Args:
        parameters: of the backbone, by name.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.parameters = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
        self.handles: list[Any] = []
        self.squares: list[torch.Tensor] = []
        self.norms: list[torch.Tensor] = []
        self.alive: dict[str, torch.Tensor] = {}

    def begin(self) -> None:
        self.squares, self.norms, self.alive = [], [], {}
        for name, parameter in self.parameters:
            self.handles.append(parameter.register_hook(lambda gradient, name=name: self._see(name, gradient)))

    def _see(self, name: str, gradient: torch.Tensor) -> None:
        with torch.no_grad():
            # one pass over the gradient gives both: the norm of each row, and with it which rows are not 0
            rows = torch.linalg.vector_norm(
                gradient.flatten(1) if gradient.dim() > 1 else gradient, dim=-1, dtype=_DTYPE
            )
            self.squares.append(rows.square().sum())
            if gradient.dim() > 1 and gradient.shape[0] >= _LAYER:
                alive = rows > 0
                self.alive[name] = self.alive[name] | alive if name in self.alive else alive

    def end_micro_batch(self) -> None:
        if self.squares:
            self.norms.append(torch.stack(self.squares).sum().sqrt())
        self.squares = []

    def end(self, device: torch.device) -> torch.Tensor:
        """Sum of the micro-batches' gradient norms, and the share of dead units in the worst layer: float32 [2]."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        nothing = torch.full((), float("nan"), device=device)
        norm = torch.stack(self.norms).sum() if self.norms else nothing
        dead = torch.stack([1 - alive.float().mean() for alive in self.alive.values()]).max() if self.alive else nothing
        return torch.stack([norm, dead])
