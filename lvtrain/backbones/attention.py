"""Where the class token looks: the last block's attention of a fViT or Part fViT, and where in the picture its patches stand."""

from __future__ import annotations

from typing import Any

import torch

from lvtrain.backbones.part_fvit import FViT, PartFViT, grid_landmarks


@torch.no_grad()
def class_attention(backbone: FViT, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `[B, 3, S, S]` -> `(attention [B, heads, N], points [B, N, 2])`, both float32.

    attention: of the class token to the N patches in the last block, as DINO draws it (Caron et al., ICCV 2021, figure 1); what it gives to
    itself is left out, so a row sums to less than 1. points: centres of the patches, (x, y) in pixels: the grid's, or the landmarks.
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
