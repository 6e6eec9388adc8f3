"""The vision transformer of DINO (ICCV 2021, arXiv 2104.14294), with its parameter names: its checkpoints load as they are.

Class token, qkv with bias, GELU, LayerNorm eps 1e-6. The embedding is the class token after the last norm. The blocks are
timm's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from pydantic import PositiveInt
from timm.layers import PatchEmbed, trunc_normal_
from timm.models.vision_transformer import Block
from torch import nn

from lvtrain.backbones.base import Backbone, count_blocks
from lvtrain.backbones.fvit import resized_positions
from lvtrain.backbones.memory import Share, drop_path_rates
from lvtrain.backbones.registry import published_sizes, register
from lvtrain.errors import UserError


@register("dino_vit_tiny", dim=192, depth=12, heads=3)
@register("dino_vit_small", dim=384, depth=12, heads=6)
@register("dino_vit_base", dim=768, depth=12, heads=12)
class DinoViT(Backbone):
    """`[B, 3, image_size, image_size]` float -> `[B, embedding_dim]` float32, not normalised.

    An `embedding_dim` other than `dim` adds a linear layer after the norm. For images of another size (DINO's local
    views), the grid of position embeddings is resized.

    Args:
        dim: width of a token.
        depth: number of blocks.
        heads: attention heads of a block.
        patch: side of a patch, in pixels.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.

    Raises:
        UserError: `dim` is not a multiple of `heads`, or the image not one of the patch.
    """

    takes_any_size = True

    def __init__(
        self,
        *,
        dim: PositiveInt,
        depth: PositiveInt,
        heads: PositiveInt,
        patch: PositiveInt = 16,
        drop_path: Share = 0.0,
        **backbone: Any,
    ) -> None:
        super().__init__(**backbone)
        embedding_dim, image_size = self.embedding_dim, self.image_size
        if dim % heads:
            raise UserError(f"backbone: dim {dim} is not a multiple of heads {heads}; change one of them")
        if image_size % patch:
            raise UserError(f"backbone: image_size {image_size} is not a multiple of the patch {patch}")
        self.dim, self.patch = dim, patch
        self.patch_embed = PatchEmbed(image_size, patch, 3, dim, strict_img_size=False)
        self.num_tokens = self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_tokens + 1, dim))
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        block = partial(Block, dim, heads, 4.0, qkv_bias=True, norm_layer=norm)
        self.blocks = nn.ModuleList([block(drop_path=rate) for rate in drop_path_rates(drop_path, depth)])
        self.norm = norm(dim)
        self.head = nn.Linear(dim, embedding_dim, bias=False) if embedding_dim != dim else nn.Identity()
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        self.init_linears()

    def forward(self, images: torch.Tensor, return_tokens: bool = False) -> Any:
        """Embeddings `[B, embedding_dim]`, or with `return_tokens` `(patch tokens [B, N, dim], embeddings)`."""
        patches = self.patch_embed(images.contiguous(memory_format=torch.channels_last))
        rows, columns = images.shape[2] // self.patch, images.shape[3] // self.patch
        positions = resized_positions(self.pos_embed[:, 1:], self.image_size // self.patch, rows, columns)
        x = torch.cat([self.cls_token.to(patches.dtype).expand(patches.shape[0], -1, -1), patches], dim=1)
        x = x + torch.cat([self.pos_embed[:, :1], positions], dim=1)
        x = self.run_blocks(self.blocks, x)
        x = self.norm(x)
        embedding = self.head(x[:, 0]).float()
        return (x[:, 1:], embedding) if return_tokens else embedding

    @classmethod
    def recognise(cls, state: Mapping[str, torch.Tensor], *, heads: int | None = None) -> dict[str, Any] | None:
        if not {"cls_token", "blocks.0.attn.qkv.bias"} <= state.keys() or "blocks.0.ls1.gamma" in state:
            return None
        dim, _, patch, _ = state["patch_embed.proj.weight"].shape
        depth = count_blocks(state, r"blocks\.(\d+)\.")
        for name, size in published_sizes(cls).items():
            if (size["dim"], size["depth"]) == (dim, depth):
                return {
                    "name": name,
                    "embedding_dim": state["head.weight"].shape[0] if "head.weight" in state else dim,
                    "image_size": math.isqrt(state["pos_embed"].shape[1] - 1) * patch,
                    **({"patch": patch} if patch != 16 else {}),
                }
        raise UserError(f"a DINO ViT of dim {dim}, depth {depth}; known are {', '.join(published_sizes(cls))}")
