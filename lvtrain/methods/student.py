"""What DINO and LAFS train: a backbone with a projection head, on several views of an image."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class ProjectionHead(nn.Module):
    """Embeddings `[B, d]` -> prototype logits `[B, K]`: an MLP of three layers with GELU, unit length, then K prototypes.

    The prototypes have unit length (DINO's `norm_last_layer`), so a logit is a cosine. While `frozen`, their gradient is 0.
    """

    def __init__(self, embedding_dim: int, prototypes: int, *, hidden: int, bottleneck: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(embedding_dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.prototypes = nn.Linear(bottleneck, prototypes, bias=False)
        self.frozen = False
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        x = functional.normalize(self.mlp(embeddings), dim=-1)
        weight = self.prototypes.weight
        if self.frozen:  # a gradient of zero, not None: ZeRO waits for a gradient of each weight
            weight = weight.detach() + 0 * weight
        return functional.linear(x, functional.normalize(weight, dim=-1))


class Student(nn.Module):
    """Backbone and head as one module: views -> `(logits [views, B, K], embeddings of the first view [B, d])`.

    Consecutive views of one size go through the backbone together.
    """

    def __init__(self, backbone: nn.Module, head: ProjectionHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, *views: Any) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings: list[torch.Tensor] = []
        for _, same in groupby(views, key=_shape):
            group = list(same)
            joined = self.backbone(*_join(group))
            embeddings.extend(joined.chunk(len(group)))
        logits = self.head(torch.cat(embeddings)).float()
        return logits.view(len(views), -1, logits.shape[-1]), embeddings[0].detach().float()


def _shape(view: Any) -> tuple[torch.Size, ...]:
    parts = view if isinstance(view, tuple) else (view,)
    return tuple(part.shape[1:] for part in parts)


def _join(group: list[Any]) -> tuple[torch.Tensor, ...]:
    """Several views as one batch: images, or tuples that begin with images."""
    if isinstance(group[0], tuple):
        return tuple(torch.cat(parts) for parts in zip(*group))
    return (torch.cat(group),)
