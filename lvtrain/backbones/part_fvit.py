"""fViT and Part fViT of LAFS (arXiv 2403.08161; Part fViT: Sun and Tzimiropoulos, BMVC 2022).

fViT cuts the image on a grid: 14x14 = 196 patches of 8x8 pixels. Part fViT has a small landmark CNN (MobileNetV3-large up
to its 160 channels), which gives 196 points, min-max scaled to the image. It samples an 8x8 patch around each, with one
differentiable `grid_sample`. Both project the patches, add positions and a class token, and run a transformer whose
attention scale is `dim ** -0.5`, as in the released code.

Parameter names are those of the released code: `patch_to_embedding`, `transformer.layers.i.{0,1}.fn`, `stn`,
`output_layer`.

Our reading: the paper gives Part fViT-Tiny as "15.28M and 2.48G Flops" only. Dim 256, depth 12, 8 heads of 64 and MLP
1024 have 15.6 M parameters and 2.5 G multiply-adds in linear layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import timm
import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt
from timm.layers import DropPath, trunc_normal_
from torch import nn

from lvtrain.backbones.base import Backbone, count_blocks
from lvtrain.backbones.landmark_cnn import ReleasedLandmarkFeatures
from lvtrain.backbones.memory import Share, drop_path_rates
from lvtrain.backbones.registry import published_sizes, register
from lvtrain.errors import UserError

LANDMARK_CNN = ("stn.", "output_layer.")  # how names of its tensors begin


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
        return self._encode(patches, positions, return_tokens)

    def _encode(self, patches: torch.Tensor, positions: torch.Tensor, return_tokens: bool) -> Any:
        """From patches `[B, N, patch * patch * 3]` (row, column, colour) and positions `[1 or B, N, dim]` to embeddings."""
        x = self.patch_to_embedding(patches) + positions
        first = (self.cls_token + self.pos_embedding[:, :1]).to(x.dtype).expand(x.shape[0], -1, -1)
        x = self.run_blocks(self.transformer.layers, self.dropout(torch.cat([first, x], dim=1)))
        embedding = self.mlp_head(x[:, 0]).float()
        return (self.mlp_head[0](x[:, 1:]), embedding) if return_tokens else embedding

    @classmethod
    def recognise(cls, state: Mapping[str, torch.Tensor], *, heads: int | None = None) -> dict[str, Any] | None:
        if not {"pos_embedding", "patch_to_embedding.weight"} <= state.keys():
            return None
        if any(name.startswith(LANDMARK_CNN[0]) for name in state) != issubclass(cls, PartFViT):
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


class LandmarkFeatures(nn.Module):
    """timm's MobileNetV3-large (arXiv 1905.02244) up to its 160 channels: `[B, 3, H, W]` -> their mean `[B, 160]`."""

    def __init__(self) -> None:
        super().__init__()
        network: Any = timm.create_model("mobilenetv3_large_100", pretrained=False, num_classes=0)
        self.conv_stem, self.bn1, self.blocks = network.conv_stem, network.bn1, network.blocks[:-1]
        self.num_features = 160

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # channels last halves the time of its depthwise convolutions on a CPU, and is what cuDNN needs
        images = images.contiguous(memory_format=torch.channels_last)
        return self.blocks(self.bn1(self.conv_stem(images))).mean(dim=(2, 3))


def grid_landmarks(side: int, patch: int = 8) -> torch.Tensor:
    """Centres of a regular `side` x `side` grid of patches, `[side * side, 2]` float32 (x, y) in pixels, row-major.

    The centre of the image's first pixel is (0, 0), so the first patch of 8 pixels has its centre at 3.5.
    """
    centre = torch.arange(side, dtype=torch.float32) * patch + (patch - 1) / 2
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


def sample_patches(images: torch.Tensor, landmarks: torch.Tensor, patch: int = 8) -> torch.Tensor:
    """Bilinear patches around points, differentiable in both arguments. What lies outside the image is 0.

    Always in float32 (float64 for float64 images): in bfloat16 a patch would be off by up to half a pixel.

    Args:
        images: float `[B, 3, H, W]`.
        landmarks: float `[B, N, 2]`, (x, y) in pixels.
        patch: side of a patch, pixels.

    Returns:
        `[B, N, patch * patch * 3]`, in the order (row, column, colour).
    """
    dtype = torch.promote_types(images.dtype, torch.float32)
    batch, number = landmarks.shape[:2]
    # (width - 1, height - 1), made on the device: copying numbers from the host would make the host wait
    size = torch.linspace(images.shape[3] - 1, images.shape[2] - 1, 2, dtype=dtype, device=images.device)
    offset = torch.arange(patch, dtype=dtype, device=images.device) - (patch - 1) / 2
    y, x = torch.meshgrid(offset, offset, indexing="ij")
    points = landmarks.to(dtype)[:, :, None, None] + torch.stack([x, y], dim=-1)  # [B, N, patch, patch, 2]
    grid = (points / size * 2 - 1).reshape(batch, number * patch, patch, 2)
    with torch.autocast(images.device.type, enabled=False):
        sampled = _sampled(images.to(dtype), grid)
    return sampled.unflatten(2, (number, patch)).permute(0, 2, 3, 4, 1).reshape(batch, number, -1)


def _sampled(images: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    if images.requires_grad:
        return F.grid_sample(images, grid, padding_mode="zeros", align_corners=True)
    sampled: torch.Tensor = _SampleGrid.apply(images, grid)
    return sampled


class _SampleGrid(torch.autograd.Function):
    """`grid_sample` with a gradient for the grid alone, the same bits on every run.

    Under deterministic algorithms torch refuses the backward of `grid_sample` on CUDA, because it adds up the images'
    gradient in no fixed order. The grid's gradient is computed point by point, and images need none in training.
    """

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(images, grid)
        return torch.ops.aten.grid_sampler_2d(images, grid, _BILINEAR, _ZEROS, True)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, _grid_gradient(gradient, *ctx.saved_tensors)


_BILINEAR, _ZEROS = 0, 0  # torch's numbers of the interpolation and of the padding


# a custom operator, because torch.compile does not trace the switch of deterministic algorithms
@torch.library.custom_op("lvtrain::grid_gradient", mutates_args=())
def _grid_gradient(gradient: torch.Tensor, images: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        of_grid: torch.Tensor
        _, of_grid = torch.ops.aten.grid_sampler_2d_backward(
            gradient, images, grid, _BILINEAR, _ZEROS, True, [False, True]
        )
        return of_grid
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warns)


@_grid_gradient.register_fake
def _(gradient: torch.Tensor, images: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(grid)


@register("part_fvit_tiny", dim=256, depth=12, heads=8, mlp_dim=1024)
@register("part_fvit_base", dim=768, depth=12, heads=11, mlp_dim=2048)
class PartFViT(FViT):
    """fViT with patches around landmarks: `[B, 3, image_size, image_size]` float -> `[B, embedding_dim]` float32.

    Args:
        landmark_margin: points are min-max scaled, for each image and axis, to [margin, side - 1 - margin] pixels. The
            default of half a patch keeps every patch inside the image, and starts training on fViT's grid (our reading).
        released: compute as LAFS's released code, for its weights. It has another landmark CNN (`landmark_cnn`), scales x
            and y together to [0, image_size - 1], counts the first pixel's centre as (1, 1), and reads patches column by
            column. `landmark_margin` is then not used.
        freeze_landmarks: the landmark CNN is not trained, and its BatchNorm uses its stored statistics.
        landmark_dropout: of the landmark CNN's features, before its linear layer; 0.5 in LAFS's released code.
        fvit: arguments of `FViT`.
    """

    # the landmark CNN learns at the rate of what stands before the blocks, as in LAFS's released code
    first_names = (*FViT.first_names, *LANDMARK_CNN)

    def __init__(
        self,
        *,
        landmark_margin: NonNegativeFloat = 3.5,
        released: bool = False,
        freeze_landmarks: bool = False,
        landmark_dropout: Share = 0.0,
        **fvit: Any,
    ) -> None:
        super().__init__(**fvit)
        self.landmark_margin, self.released, self.freeze_landmarks = landmark_margin, released, freeze_landmarks
        self.stn: Any = ReleasedLandmarkFeatures() if released else LandmarkFeatures()
        linear = nn.Linear(self.stn.num_features, 2 * self.num_tokens)
        dropout = nn.Dropout(landmark_dropout) if landmark_dropout else nn.Identity()
        self.output_layer = nn.Sequential(dropout, linear)
        nn.init.normal_(linear.weight, std=1e-3)
        with torch.no_grad():  # start on the grid; coordinates are shares of the image
            linear.bias.copy_((grid_landmarks(self.side, self.patch) / (self.image_size - 1)).flatten())
        if freeze_landmarks:
            self.stn.requires_grad_(False)
            self.output_layer.requires_grad_(False)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if self.freeze_landmarks:
            self.stn.eval()
            self.output_layer.eval()
        return self

    def landmark_state(self) -> dict[str, torch.Tensor]:
        """The tensors of the landmark CNN, by their names in `state_dict()`."""
        return {name: tensor for name, tensor in self.state_dict().items() if name.startswith(LANDMARK_CNN)}

    def predict_landmarks(self, images: torch.Tensor) -> torch.Tensor:
        """The landmark CNN's points, `[B, num_tokens, 2]` float32, (x, y) in pixels, min-max scaled to the given images."""
        features, last = self.stn(images), images.shape[-1] - 1
        with torch.autocast(images.device.type, enabled=False):  # points in bfloat16 would be off by half a pixel
            points = self.output_layer(features.to(torch.promote_types(images.dtype, torch.float32)))
            points = points.unflatten(1, (self.num_tokens, 2))
            if self.released:
                low, high = points.amin(dim=(1, 2), keepdim=True), points.amax(dim=(1, 2), keepdim=True)
                return (points - low) / (high - low).clamp_min(1e-6) * last - 1
            low, high = points.amin(dim=1, keepdim=True), points.amax(dim=1, keepdim=True)
            unit = (points - low) / (high - low).clamp_min(1e-6)
            return self.landmark_margin + unit * (last - 2 * self.landmark_margin)

    def forward(  # type: ignore[override]
        self,
        images: torch.Tensor,
        landmarks: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        return_landmarks: bool = False,
        return_tokens: bool = False,
    ) -> Any:
        """Embeddings `[B, embedding_dim]`, or a tuple of tokens `[B, N, dim]`, embeddings and landmarks `[B, N, 2]`.

        Args:
            images: float `[B, 3, S, S]`.
            landmarks: `[B, N, 2]`, (x, y) in pixels: any number of points in any order. Absent: the landmark CNN's.
            positions: int64 `[N]` or `[B, N]`, the position embedding (0 to num_tokens - 1) of each landmark. Absent:
                landmark i has position i.
            return_landmarks: return the landmarks, too.
            return_tokens: return the tokens, too.

        Raises:
            UserError: more landmarks than position embeddings, and no `positions`.
        """
        if landmarks is None:
            landmarks = self.predict_landmarks(images)
        number = landmarks.shape[1]
        if positions is None:
            if number > self.num_tokens:
                raise UserError(
                    f"Part fViT: {number} landmarks but only {self.num_tokens} positions; say which with positions="
                )
            embedded = self.pos_embedding[:, 1 : number + 1]
        else:
            embedded = self.pos_embedding[0, 1:][positions]
            embedded = embedded if embedded.ndim == 3 else embedded[None]
        patches = sample_patches(images, landmarks, self.patch)
        if self.released:  # (row, column, colour) -> (column, row, colour)
            patches = patches.unflatten(2, (self.patch, self.patch, 3)).transpose(2, 3).flatten(2)
        output = self._encode(patches, embedded, return_tokens)
        if not return_landmarks:
            return output
        return (*output, landmarks) if return_tokens else (output, landmarks)
