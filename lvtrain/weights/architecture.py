"""Which of our backbones a bare state dict is, read off names and shapes; and fitting it where sizes differ."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lvtrain.backbones import create_backbone
from lvtrain.backbones.dino_vit import SHAPES as DINO_SHAPES
from lvtrain.backbones.iresnet import LAYERS
from lvtrain.backbones.mobilefacenet import SHAPES as MOBILE_SHAPES
from lvtrain.backbones.part_fvit import SHAPES as FVIT_SHAPES
from lvtrain.backbones.vit import SHAPES as VIT_SHAPES
from lvtrain.errors import UserError


@dataclass
class Architecture:
    """`create_backbone(name, embedding_dim=..., image_size=..., **overrides)` builds it."""

    name: str
    embedding_dim: int
    image_size: int = 112
    overrides: dict[str, Any] = field(default_factory=dict)

    def create(self) -> nn.Module:
        return create_backbone(
            self.name, embedding_dim=self.embedding_dim, image_size=self.image_size, **self.overrides
        )


def recognise(state: Mapping[str, torch.Tensor], *, heads: int | None = None) -> Architecture:
    """The backbone whose weights these are. `heads`: attention heads of a ViT of no published size, which its weights do not tell.

    Raises:
        UserError: none of ours (the line says what the names look like and which families are known), or a ViT whose heads must be given.
    """
    try:
        if "patch_embed.proj.weight" in state and "feature.0.weight" in state:
            return _vit(state, heads)
        if "layer1.0.bn1.weight" in state and "fc.weight" in state:
            return _iresnet(state)
        if "conv_sep.layers.0.weight" in state and "features.layers.2.weight" in state:
            return _mobilefacenet(state)
        if "pos_embedding" in state and "patch_to_embedding.weight" in state:
            return _fvit(state)
        if "cls_token" in state and "blocks.0.attn.qkv.bias" in state and "blocks.0.ls1.gamma" not in state:
            return _dino(state)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"these weights are named like a backbone's, but tensors are missing or of other shapes ({type(error).__name__}: {error})"
        ) from error
    raise UserError(
        "these weights are none of vit (arcface_torch, LVFace, CVLface), iresnet, mobilefacenet, fvit, part_fvit or DINO's ViT; "
        f"their names start {', '.join(list(state)[:4])}"
    )


# CVLface's small and base: (dim, depth, patch, MLP ratio) -> heads
_CVLFACE_HEADS = {(512, 12, 8, 5.0): 8, (512, 24, 8, 3.0): 16}


def _depth(state: Mapping[str, torch.Tensor], pattern: str) -> int:
    return 1 + max(int(match[1]) for name in state if (match := re.match(pattern, name)))


def _vit(state: Mapping[str, torch.Tensor], heads: int | None) -> Architecture:
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    depth = _depth(state, r"blocks\.(\d+)\.")
    embedding_dim = state["feature.2.weight"].shape[0]
    tokens = state["pos_embed"].shape[1]
    ratio = state["blocks.0.mlp.fc1.weight"].shape[0] / dim
    image_size = 112 if (112 // patch) ** 2 == tokens else math.isqrt(tokens) * patch
    for name, shape in VIT_SHAPES.items():
        if (shape.dim, shape.depth, shape.patch) == (dim, depth, patch) and ratio == 4:
            return Architecture(name, embedding_dim, image_size)
    heads = heads or _CVLFACE_HEADS.get((dim, depth, patch, ratio))
    if heads is None:
        raise UserError(
            f"a ViT of dim {dim}, depth {depth}, patch {patch}, MLP ratio {ratio:g} is no published size, and weights do not tell the number of "
            "attention heads; give it: tools/convert_checkpoint.py import --heads N"
        )
    overrides = {"dim": dim, "depth": depth, "patch": patch, "heads": heads, "mlp_ratio": ratio}
    return Architecture("vit_b", embedding_dim, image_size, overrides)


def _iresnet(state: Mapping[str, torch.Tensor]) -> Architecture:
    layers = tuple(_depth(state, rf"layer{i}\.(\d+)\.") for i in (1, 2, 3, 4))
    for name, known in LAYERS.items():
        if known == layers:
            side = math.isqrt(state["fc.weight"].shape[1] // 512)
            overrides = {} if "layer1.0.downsample.0.weight" in state else {"first_shortcut": "subsample"}
            return Architecture(name, state["fc.weight"].shape[0], side * 16, overrides)
    raise UserError(f"an IResNet with {layers} blocks; known are {', '.join(f'{n} {b}' for n, b in LAYERS.items())}")


def _mobilefacenet(state: Mapping[str, torch.Tensor]) -> Architecture:
    scale = state["layers.0.layers.0.weight"].shape[0] // 64
    residual = "layers.1.layers.0.layers.0.layers.0.weight" in state  # else its first stage is one grouped convolution
    first = _depth(state, r"layers\.1\.layers\.(\d+)\.") if residual else 1
    blocks = (first, *(_depth(state, rf"layers\.{i}\.layers\.(\d+)\.layers\.") for i in (3, 5, 7)))
    embedding_dim, image_size = (
        state["features.layers.2.weight"].shape[0],
        16 * state["features.layers.0.layers.0.weight"].shape[-1],
    )
    for name, shape in MOBILE_SHAPES.items():
        if (shape.blocks, shape.scale) == (blocks, scale):
            return Architecture(name, embedding_dim, image_size)
    return Architecture("mobilefacenet", embedding_dim, image_size, {"blocks": blocks, "scale": scale})


def _fvit(state: Mapping[str, torch.Tensor]) -> Architecture:
    dim = state["cls_token"].shape[-1]
    depth = _depth(state, r"transformer\.layers\.(\d+)\.")
    inner = state["transformer.layers.0.0.fn.fn.to_qkv.weight"].shape[0] // 3
    mlp = state["transformer.layers.0.1.fn.fn.net.0.weight"].shape[0]
    patch = math.isqrt(state["patch_to_embedding.weight"].shape[1] // 3)
    image_size = math.isqrt(state["pos_embedding"].shape[1] - 1) * patch
    embedding_dim = state["mlp_head.1.weight"].shape[0] if "mlp_head.1.weight" in state else dim
    family = "part_fvit" if any(name.startswith("stn.") for name in state) else "fvit"
    for size, shape in FVIT_SHAPES.items():
        if (shape.dim, shape.depth, shape.mlp_dim, shape.heads * shape.head_dim) == (dim, depth, mlp, inner):
            overrides: dict[str, Any] = {"patch": patch} if patch != 8 else {}
            if any(name.startswith("stn.features.") for name in state):  # the landmark CNN of LAFS's own code
                overrides["released"] = True
            return Architecture(f"{family}_{size}", embedding_dim, image_size, overrides)
    raise UserError(
        f"a {family} of dim {dim}, depth {depth}, MLP {mlp}, attention width {inner}; known are {', '.join(FVIT_SHAPES)}"
    )


def _dino(state: Mapping[str, torch.Tensor]) -> Architecture:
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    depth = _depth(state, r"blocks\.(\d+)\.")
    image_size = math.isqrt(state["pos_embed"].shape[1] - 1) * patch
    embedding_dim = state["head.weight"].shape[0] if "head.weight" in state else dim
    for size, shape in DINO_SHAPES.items():
        if (shape.dim, shape.depth) == (dim, depth):
            overrides = {"patch": patch} if patch != 16 else {}
            return Architecture(f"dino_vit_{size}", embedding_dim, image_size, overrides)
    raise UserError(f"a DINO ViT of dim {dim}, depth {depth}; known are {', '.join(DINO_SHAPES)}")


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


def fit(module: nn.Module, state: Mapping[str, torch.Tensor], *, strict: bool = True) -> Fit:
    """Loads `state` into `module`, resizing position embeddings to the module's grid (bicubic, a class token's own kept).

    Raises:
        UserError: a shape that cannot be fitted, or (strict) a tensor the file lacks.
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
    if strict and needed:
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
