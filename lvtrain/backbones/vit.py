"""The plain vision transformer of LVFace (arXiv 2501.13420) and insightface's arcface_torch.

- input 112x112, patch 9: 12x12 = 144 tokens. The last 4 pixels at the right and bottom are never seen.
- no class token; qkv without bias; MLP of ratio 4 with ReLU6; LayerNorm eps 1e-5.
- all tokens are flattened into Linear -> BatchNorm -> Linear -> BatchNorm, which gives the embedding.

Parameter names are those of arcface_torch, so its weights and LVFace's load as they are. The blocks are timm's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from timm.layers import PatchEmbed, trunc_normal_
from timm.models.vision_transformer import Block
from torch import nn

from lvtrain.backbones.base import Backbone, count_blocks
from lvtrain.backbones.layers import Float32BatchNorm1d, ReLU6
from lvtrain.backbones.memory import Share, drop_path_rates
from lvtrain.backbones.registry import published_sizes, register
from lvtrain.errors import UserError

# attention heads of CVLface's small and base, which are not sizes of LVFace: (dim, depth, patch, MLP ratio) -> heads
CVLFACE_HEADS = {(512, 12, 8, 5.0): 8, (512, 24, 8, 3.0): 16}
TOKEN_TILE = 16  # kept tokens are a multiple of this: attention and matmul kernels work in tiles of 16


def kept_tokens(num_tokens: int, mask_ratio: float) -> int:
    """Tokens that go through the blocks in training: what is not masked, rounded down to a multiple of 16.

    A ratio of 0.05 or 0.1 keeps 128 of 144. arcface_torch ignores the configured ratio and keeps 129.
    """
    if mask_ratio == 0:
        return num_tokens
    keep = int(num_tokens * (1 - mask_ratio))
    return max(1, keep - keep % TOKEN_TILE if keep > TOKEN_TILE else keep)


@register("vit_nano", dim=128, depth=6, heads=4, patch=16)  # for trying things on a CPU; not a published size
@register("vit_t", dim=256, depth=12, heads=8, drop_path=0.05)
@register("vit_s", dim=512, depth=12, heads=8, drop_path=0.05)
@register("vit_b", dim=512, depth=24, heads=8, drop_path=0.05, mask_ratio=0.05)
@register("vit_l", dim=768, depth=24, heads=8, drop_path=0.05, mask_ratio=0.05)
@register("vit_h", dim=1024, depth=48, heads=8, drop_path=0.1)
class VisionTransformer(Backbone):
    """`[B, 3, image_size, image_size]` float -> `[B, embedding_dim]` float32, not normalised.

    Args:
        dim: width of a token.
        depth: number of blocks.
        heads: attention heads of a block.
        patch: side of a patch, in pixels.
        mlp_ratio: a block's MLP is `dim * mlp_ratio` wide.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        mask_ratio: share of the tokens that are dropped before the blocks in training (see `kept_tokens`). Before the
            head, a learnt mask token takes their places. The draw is from torch's default generator of the device.

    Raises:
        UserError: `dim` is not a multiple of `heads`, or the image is smaller than a patch.
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
        **backbone: Any,
    ) -> None:
        super().__init__(**backbone)
        embedding_dim, image_size = self.embedding_dim, self.image_size
        if dim % heads:
            raise UserError(f"backbone: dim {dim} is not a multiple of heads {heads}; change one of them")
        if image_size < patch:
            raise UserError(f"backbone: image_size {image_size} is smaller than one patch of {patch}")
        self.dim = dim
        self.patch_embed = PatchEmbed(image_size, patch, 3, dim)
        self.num_tokens = self.patch_embed.num_patches
        self.kept_tokens = kept_tokens(self.num_tokens, mask_ratio)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_tokens, dim))
        # arcface_torch's files always have it; it is not trained where it is not used
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
        """As arcface_torch: truncated normal of 0.02 for linears and positions, normal of 0.02 for the mask token."""
        trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        self.init_linears()

    def forward(self, images: torch.Tensor, return_tokens: bool = False) -> Any:
        """Embeddings `[B, embedding_dim]`, or with `return_tokens` `(patch tokens [B, N, dim], embeddings)`."""
        # in channels-last the patch convolution reads the pixels of a patch in one run
        x = self.patch_embed(images.contiguous(memory_format=torch.channels_last)) + self.pos_embed
        masked = self.training and self.kept_tokens < self.num_tokens
        if masked:
            order = torch.rand(x.shape[:2], device=x.device).argsort(dim=1)
            kept = order[:, : self.kept_tokens, None].expand(-1, -1, self.dim)
            x = x.gather(1, kept)
        x = self.run_blocks(self.blocks, x)
        x = self.norm(x)
        if masked:
            x = self.mask_token.to(x.dtype).expand(x.shape[0], self.num_tokens, -1).scatter(1, kept, x)
        embedding = self.feature(x.flatten(1))
        return (x, embedding) if return_tokens else embedding

    @classmethod
    def recognise(cls, state: Mapping[str, torch.Tensor], *, heads: int | None = None) -> dict[str, Any] | None:
        if not {"patch_embed.proj.weight", "feature.0.weight"} <= state.keys():
            return None
        dim, _, patch, _ = state["patch_embed.proj.weight"].shape
        depth, tokens = count_blocks(state, r"blocks\.(\d+)\."), state["pos_embed"].shape[1]
        ratio = state["blocks.0.mlp.fc1.weight"].shape[0] / dim
        found = {
            "embedding_dim": state["feature.2.weight"].shape[0],
            "image_size": 112 if (112 // patch) ** 2 == tokens else math.isqrt(tokens) * patch,
        }
        for name, size in published_sizes(cls).items():
            if (size["dim"], size["depth"], size.get("patch", 9)) == (dim, depth, patch) and ratio == 4:
                return {"name": name, **found}
        heads = heads or CVLFACE_HEADS.get((dim, depth, patch, ratio))
        if heads is None:
            raise UserError(
                f"a ViT of dim {dim}, depth {depth}, patch {patch}, MLP ratio {ratio:g} is not a published size, and "
                "weights do not show the number of attention heads; give it: tools/convert_checkpoint.py import --heads N"
            )
        shape = {"dim": dim, "depth": depth, "patch": patch, "heads": heads, "mlp_ratio": ratio}
        return {"name": "vit_b", **found, **shape}
