"""Attention of the class token of a fViT or Part fViT in its last block, and the places of the patches."""

from __future__ import annotations

from typing import Any

import torch

from lvtrain.backbones.fvit import FViT
from lvtrain.backbones.landmarks.patches import grid_landmarks
from lvtrain.backbones.part_fvit import PartFViT


@torch.no_grad()
def class_attention(backbone: FViT, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the class token to the patches in the last block, as DINO shows it (ICCV 2021, figure 1).

    Args:
        backbone: in evaluation mode.
        images: float `[B, 3, S, S]`.

    Returns:
        Attention float32 `[B, heads, N]`, which sums to less than 1, because the class token's own share is left out;
        and centres of the patches `[B, N, 2]`, (x, y) in pixels.
    """
    seen: list[torch.Tensor] = []
    last: Any = backbone.transformer.layers[-1]
    attention = last[0].fn.fn
    handle = attention.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    try:
        if isinstance(backbone, PartFViT):
            _, points = backbone(images, return_landmarks=True)
        else:
            backbone(images)
            points = grid_landmarks(backbone.side, backbone.patch).to(images.device).expand(len(images), -1, -1)
    finally:
        handle.remove()
    q, k, _ = attention.to_qkv(seen[0]).unflatten(2, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q[:, :, :1] @ k.transpose(2, 3) * attention.scale).float().softmax(dim=-1)
    return weights[:, :, 0, 1:], points.float()
