"""Recognises the backbone of a bare state dict by names and shapes, and fits weights of other sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lvtrain.backbones.base import Backbone
from lvtrain.backbones.registry import backbone_classes, create_backbone
from lvtrain.errors import UserError


@dataclass
class Architecture:
    """`create_backbone(name, embedding_dim=..., image_size=..., **overrides)` builds it."""

    name: str
    embedding_dim: int
    image_size: int = 112
    overrides: dict[str, Any] = field(default_factory=dict)

    def create(self) -> Backbone:
        return create_backbone(
            self.name, embedding_dim=self.embedding_dim, image_size=self.image_size, **self.overrides
        )


def recognise(state: Mapping[str, torch.Tensor], *, heads: int | None = None) -> Architecture:
    """The backbone that these weights belong to. Each backbone's class recognises its own.

    Args:
        state: weights by name.
        heads: attention heads of a vision transformer that is not a published size; weights do not show them.

    Raises:
        UserError: no backbone fits, or a vision transformer's `heads` must be given.
    """
    try:
        for cls in backbone_classes():
            if found := cls.recognise(state, heads=heads):
                return Architecture(found.pop("name"), found.pop("embedding_dim"), found.pop("image_size"), found)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"these weights are named like a backbone's, but tensors are missing or of other shapes ({type(error).__name__}: {error})"
        ) from error
    raise UserError(
        f"these weights fit no backbone ({', '.join(sorted(cls.__name__ for cls in backbone_classes()))}); "
        f"their names start {', '.join(list(state)[:4])}"
    )


@dataclass
class Fit:
    """What `fit` did: tensors taken as they are, resized, missing in the file (kept as initialised), and unused from the file."""

    matched: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} tensors matched"]
        for what in ("resized", "missing", "unused"):
            names = getattr(self, what)
            if names:
                parts.append(f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")
        return "; ".join(parts)


def fit(module: nn.Module, state: Mapping[str, torch.Tensor]) -> Fit:
    """Loads `state` into `module`, resizing position embeddings to the module's grid (bicubic, a class token's own kept).

    Raises:
        UserError: a shape that cannot be fitted, or a tensor the file lacks.
    """
    report, taken = Fit(), {}
    own = module.state_dict()
    for name, tensor in own.items():
        if name not in state:
            # counters and a mask token that only training reads may be absent
            (report.matched if name.endswith("num_batches_tracked") else report.missing).append(name)
            continue
        given = state[name]
        if given.shape != tensor.shape:
            if name not in ("pos_embed", "pos_embedding"):
                raise UserError(f"{name} is {tuple(given.shape)} in the file, {tuple(tensor.shape)} in the backbone")
            given = resize_positions(given, tensor.shape[1])
            report.resized.append(name)
        else:
            report.matched.append(name)
        taken[name] = given.to(tensor.dtype)
    report.unused = [name for name in state if name not in own]
    needed = [name for name in report.missing if name != "mask_token"]
    if needed:
        raise UserError(f"the file lacks {len(needed)} tensors of the backbone: {', '.join(needed[:4])}")
    module.load_state_dict(taken, strict=False)
    return report


def resize_positions(positions: torch.Tensor, tokens: int) -> torch.Tensor:
    """`[1, P, d]` or, with class token, `[1, 1 + P, d]` -> the same for `tokens` positions; both grids square."""
    extra = 0 if math.isqrt(tokens) ** 2 == tokens else 1
    have = 0 if math.isqrt(positions.shape[1]) ** 2 == positions.shape[1] else 1
    first, grid = positions[:, :have], positions[:, have:]
    old, new = math.isqrt(grid.shape[1]), math.isqrt(tokens - extra)
    if old**2 != grid.shape[1] or new**2 != tokens - extra:
        raise UserError(f"cannot resize {positions.shape[1]} positions to {tokens}: one of them is not a square grid")
    picture = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    resized = functional.interpolate(picture, size=(new, new), mode="bicubic", antialias=False)
    resized = resized.permute(0, 2, 3, 1).reshape(1, new * new, -1)
    if extra and not have:
        first = positions.new_zeros(1, 1, positions.shape[2])
    return torch.cat([first[:, :extra], resized], dim=1)
