"""fViT of LAFS (arXiv 2403.08161): a ViT on a grid of 14x14 = 196 patches of 8x8 pixels.

It projects the patches, adds positions and a class token, and runs a transformer whose attention scale is `dim ** -0.5`,
as in the released code. Parameter names are those of the released code: `patch_to_embedding`,
`transformer.layers.i.{0,1}.fn`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from timm.layers import DropPath, trunc_normal_
from torch import nn

from lvtrain.backbones.base import Backbone, count_blocks
from lvtrain.backbones.memory import Share, drop_path_rates
from lvtrain.backbones.registry import published_sizes, register
from lvtrain.errors import UserError


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim**-0.5
        self.to_qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * head_dim, dim), nn.Dropout(dropout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.to_qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.to_out(y.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, dim: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, mlp_dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(mlp_dim, dim), nn.Dropout(dropout)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class _PreNorm(nn.Module):
    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(dim), fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fn(self.norm(x))


class _Residual(nn.Module):
    def __init__(self, dim: int, fn: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.fn, self.drop_path = _PreNorm(dim, fn), DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop_path(self.fn(x))


def resized_positions(positions: torch.Tensor, side: int, rows: int, columns: int) -> torch.Tensor:
    """Position embeddings `[1, side * side, dim]` of a grid for a grid of another size, `[1, rows * columns, dim]` (bicubic)."""
    if (rows, columns) == (side, side):
        return positions
    grid = positions.unflatten(1, (side, side)).permute(0, 3, 1, 2).float()
    return F.interpolate(grid, (rows, columns), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


@register("fvit_tiny", dim=256, depth=12, heads=8, mlp_dim=1024)
@register("fvit_base", dim=768, depth=12, heads=11, mlp_dim=2048)
class FViT(Backbone):
    """`[B, 3, image_size, image_size]` float -> `[B, embedding_dim]` float32, the class token after its norm, not normalised.

    An `embedding_dim` other than `dim` adds a linear layer after the norm; LAFS has `embedding_dim = dim`. For images of
    another size (DINO's local views), the grid of position embeddings is resized (bicubic), as DINO does.

    Args:
        dim: width of a token.
        depth: number of blocks.
        heads: attention heads of a block.
        head_dim: width of a head.
        mlp_dim: hidden width of a block's MLP.
        patch: side of a patch, in pixels.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        drop_path_in: `ramp`, as above; `all`: every block has `drop_path`, as in LAFS's released code.
        dropout: in attention, MLP and after the positions.

    Raises:
        UserError: the image is not a multiple of the patch.
    """

    block_names = r"transformer\.layers\.(\d+)\."
    first_names: ClassVar[tuple[str, ...]] = ("pos_embedding", "cls_token", "patch_to_embedding.")
    undecayed = ("pos_embedding", "cls_token")
    takes_any_size = True
    landmark_cnn: ClassVar[tuple[str, ...]] = ()  # how names of its tensors begin

    def __init__(
        self,
        *,
        dim: PositiveInt,
        depth: PositiveInt,
        heads: PositiveInt,
        head_dim: PositiveInt = 64,
        mlp_dim: PositiveInt,
        patch: PositiveInt = 8,
        drop_path: Share = 0.0,
        drop_path_in: Literal["ramp", "all"] = "ramp",
        dropout: Share = 0.0,
        **backbone: Any,
    ) -> None:
        super().__init__(**backbone)
        embedding_dim, image_size = self.embedding_dim, self.image_size
        if image_size % patch:
            raise UserError(f"backbone: image_size {image_size} is not a multiple of the patch {patch}")
        self.dim, self.patch = dim, patch
        self.side = image_size // patch
        self.num_tokens = self.side**2
        self.patch_to_embedding = nn.Linear(3 * patch * patch, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.zeros(1, self.num_tokens + 1, dim))
        self.dropout = nn.Dropout(dropout)
        layers = nn.ModuleList(
            nn.Sequential(
                _Residual(dim, _Attention(dim, heads, head_dim, dropout), rate),
                _Residual(dim, _FeedForward(dim, mlp_dim, dropout), rate),
            )
            for rate in ([drop_path] * depth if drop_path_in == "all" else drop_path_rates(drop_path, depth))
        )
        self.transformer: Any = nn.ModuleDict({"layers": layers})
        projection = [nn.Linear(dim, embedding_dim, bias=False)] if embedding_dim != dim else []
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), *projection)
        trunc_normal_(self.pos_embedding, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        self.init_linears()

    def forward(self, images: torch.Tensor, return_tokens: bool = False) -> Any:
        """Embeddings `[B, embedding_dim]`, or with `return_tokens` `(patch tokens [B, N, dim], embeddings)`."""
        rows, columns = images.shape[2] // self.patch, images.shape[3] // self.patch
        positions = resized_positions(self.pos_embedding[:, 1:], self.side, rows, columns)
        patches = images.unflatten(2, (rows, self.patch)).unflatten(4, (columns, self.patch))
        patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(images.shape[0], rows * columns, -1)
        return self.encode(patches, positions, return_tokens)

    def encode(self, patches: torch.Tensor, positions: torch.Tensor, return_tokens: bool = False) -> Any:
        """Embeddings from patches and their position embeddings, for a caller that chooses both.

        Args:
            patches: float `[B, N, patch * patch * 3]`, each in the order row, column, colour.
            positions: float `[1 or B, N, dim]`.
            return_tokens: also return the tokens of the patches.

        Returns:
            float32 `[B, embedding_dim]`; with `return_tokens` `(tokens [B, N, dim], embeddings)`.
        """
        x = self.patch_to_embedding(patches) + positions
        first = (self.cls_token + self.pos_embedding[:, :1]).to(x.dtype).expand(x.shape[0], -1, -1)
        x = self.run_blocks(self.transformer.layers, self.dropout(torch.cat([first, x], dim=1)))
        embedding = self.mlp_head(x[:, 0]).float()
        return (self.mlp_head[0](x[:, 1:]), embedding) if return_tokens else embedding

    @classmethod
    def recognise(cls, state: Mapping[str, torch.Tensor], *, heads: int | None = None) -> dict[str, Any] | None:
        if not {"pos_embedding", "patch_to_embedding.weight"} <= state.keys():
            return None
        if any(name.startswith("stn.") for name in state) != bool(cls.landmark_cnn):
            return None
        dim, depth = state["cls_token"].shape[-1], count_blocks(state, r"transformer\.layers\.(\d+)\.")
        inner = state["transformer.layers.0.0.fn.fn.to_qkv.weight"].shape[0] // 3
        mlp_dim = state["transformer.layers.0.1.fn.fn.net.0.weight"].shape[0]
        patch = math.isqrt(state["patch_to_embedding.weight"].shape[1] // 3)
        released = any(name.startswith("stn.features.") for name in state)  # the landmark CNN of LAFS's own code
        for name, size in published_sizes(cls).items():
            if (size["dim"], size["depth"], size["mlp_dim"], size["heads"] * 64) == (dim, depth, mlp_dim, inner):
                return {
                    "name": name,
                    "embedding_dim": state["mlp_head.1.weight"].shape[0] if "mlp_head.1.weight" in state else dim,
                    "image_size": math.isqrt(state["pos_embedding"].shape[1] - 1) * patch,
                    **({"patch": patch} if patch != 8 else {}),
                    **({"released": True} if released else {}),
                }
        raise UserError(
            f"a {cls.__name__} of dim {dim}, depth {depth}, MLP {mlp_dim}, attention width {inner}; "
            f"known are {', '.join(published_sizes(cls))}"
        )
