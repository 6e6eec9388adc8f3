"""The plain vision transformer of LVFace (arXiv 2501.13420) and insightface's arcface_torch: image -> embedding.

112x112 input, patch 9 (12x12 = 144 tokens; the last 4 pixels at the right and bottom are never seen), no class token,
qkv without bias, ReLU6 MLP of ratio 4, LayerNorm eps 1e-5; all tokens flattened into Linear -> BatchNorm -> Linear ->
BatchNorm. Parameter names are those of arcface_torch, so its and LVFace's weights load as they are. The blocks are
timm's, attention is torch's SDPA.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from timm.layers import PatchEmbed, trunc_normal_
from timm.models.vision_transformer import Block
from torch import nn

from lvtrain.backbones.activation import ReLU6
from lvtrain.backbones.memory import Recompute, Share, drop_path_rates, run_blocks
from lvtrain.backbones.norm import Float32BatchNorm1d
from lvtrain.errors import UserError

TOKEN_TILE = 16  # kept tokens are a multiple of this: attention and matmul kernels work in tiles of 16


@dataclass(frozen=True)
class ViTShape:
    """One row of the table of published shapes."""

    dim: int
    depth: int
    heads: int
    drop_path: float
    mask_ratio: float
    patch: int = 9


SHAPES = {
    "vit_nano": ViTShape(128, 6, 4, 0.0, 0.0, patch=16),  # for trying things on a CPU; not a published shape
    "vit_t": ViTShape(256, 12, 8, 0.05, 0.0),
    "vit_s": ViTShape(512, 12, 8, 0.05, 0.0),
    "vit_b": ViTShape(512, 24, 8, 0.05, 0.05),
    "vit_l": ViTShape(768, 24, 8, 0.05, 0.05),
    "vit_h": ViTShape(1024, 48, 8, 0.1, 0.0),
}


def kept_tokens(num_tokens: int, mask_ratio: float) -> int:
    """How many tokens go through the blocks in training: `num_tokens` less the masked share, rounded down to a tile.

    A ratio of 0.05 or 0.1 keeps 128 of 144 (arcface_torch keeps 129 for both, since it ignores the configured ratio;
    129 tiles badly).
    """
    if mask_ratio == 0:
        return num_tokens
    keep = int(num_tokens * (1 - mask_ratio))
    return max(1, keep - keep % TOKEN_TILE if keep > TOKEN_TILE else keep)


class VisionTransformer(nn.Module):
    """`[B, 3, image_size, image_size]` float -> `[B, embedding_dim]` float32, not normalised.

    dim, depth, heads, mlp_ratio, patch: the transformer's shape; the MLP's hidden width is `dim * mlp_ratio`.
    drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
    mask_ratio: share of the tokens dropped before the blocks in training (see `kept_tokens`); learnt mask tokens
        stand in their places before the head. Which are dropped is drawn from torch's default generator of the
        device, so `torch.manual_seed` decides.
    checkpoint_blocks, checkpoint_every: what is recomputed in the backward pass, see `lvtrain.backbones.memory`.

    Every parameter is used in its own module's forward, as ZeRO-3 needs; call the module, never its parts.
    """

    def __init__(
        self,
        *,
        dim: PositiveInt,
        depth: PositiveInt,
        heads: PositiveInt,
        patch: PositiveInt = 9,
        mlp_ratio: PositiveFloat = 4.0,
        drop_path: Share = 0.0,
        mask_ratio: Share = 0.0,
        embedding_dim: PositiveInt = 512,
        image_size: PositiveInt = 112,
        checkpoint_blocks: Recompute = "none",
        checkpoint_every: PositiveInt = 1,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise UserError(f"backbone: dim {dim} is not a multiple of heads {heads}; change one of them")
        if image_size < patch:
            raise UserError(f"backbone: image_size {image_size} is smaller than one patch of {patch}")
        self.dim, self.embedding_dim, self.image_size = dim, embedding_dim, image_size
        self.checkpoint_blocks, self.checkpoint_every = checkpoint_blocks, checkpoint_every
        self.patch_embed = PatchEmbed(image_size, patch, 3, dim)
        self.num_tokens = self.patch_embed.num_patches
        self.kept_tokens = kept_tokens(self.num_tokens, mask_ratio)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_tokens, dim))
        # always there, for arcface_torch's key names; not trained where it is not used
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim), requires_grad=self.kept_tokens < self.num_tokens)
        norm: Any = partial(nn.LayerNorm, eps=1e-5)
        block = partial(Block, dim, heads, mlp_ratio, qkv_bias=False, act_layer=ReLU6, norm_layer=norm)
        self.blocks = nn.ModuleList([block(drop_path=rate) for rate in drop_path_rates(drop_path, depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.feature = nn.Sequential(
            nn.Linear(self.num_tokens * dim, dim, bias=False),
            Float32BatchNorm1d(dim, eps=2e-5),
            nn.Linear(dim, embedding_dim, bias=False),
            Float32BatchNorm1d(embedding_dim, eps=2e-5),
        )
        self.init_weights()

    def init_weights(self) -> None:
        """arcface_torch's: truncated normal of 0.02 for linears and positions, normal of 0.02 for the mask token."""
        trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: torch.Tensor, return_tokens: bool = False) -> Any:
        """Embeddings `[B, embedding_dim]`, or with `return_tokens` `(patch tokens [B, N, dim], embeddings)`."""
        # channels-last lets the patch convolution read each patch's pixels in one run
        x = self.patch_embed(images.contiguous(memory_format=torch.channels_last)) + self.pos_embed
        masked = self.training and self.kept_tokens < self.num_tokens
        if masked:
            order = torch.rand(x.shape[:2], device=x.device).argsort(dim=1)
            kept = order[:, : self.kept_tokens, None].expand(-1, -1, self.dim)
            x = x.gather(1, kept)
        x = run_blocks(self.blocks, x, self.checkpoint_blocks if self.training else "none", self.checkpoint_every)
        x = self.norm(x)
        if masked:
            x = self.mask_token.to(x.dtype).expand(x.shape[0], self.num_tokens, -1).scatter(1, kept, x)
        embedding = self.feature(x.flatten(1))
        return (x, embedding) if return_tokens else embedding

    def tokens(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(patch tokens [B, N, dim] after the last norm, embeddings)`; tokens are row-major over the patch grid."""
        return self(images, return_tokens=True)
