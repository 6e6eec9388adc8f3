"""The names under which backbones are known, and how each is built."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from torch import nn

from lvtrain.backbones import dino_vit, iresnet, mobilefacenet, part_fvit, vit
from lvtrain.errors import UserError

_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    **{name: partial(vit.VisionTransformer, **asdict(shape)) for name, shape in vit.SHAPES.items()},
    **{name: partial(iresnet.IResNet, layers=layers) for name, layers in iresnet.LAYERS.items()},
    **{name: partial(mobilefacenet.MobileFaceNet, **asdict(shape)) for name, shape in mobilefacenet.SHAPES.items()},
    **{f"dino_vit_{size}": partial(dino_vit.DinoViT, **asdict(shape)) for size, shape in dino_vit.SHAPES.items()},
    **{f"fvit_{size}": partial(part_fvit.FViT, **asdict(shape)) for size, shape in part_fvit.SHAPES.items()},
    **{f"part_fvit_{size}": partial(part_fvit.PartFViT, **asdict(shape)) for size, shape in part_fvit.SHAPES.items()},
}


def backbone_names() -> list[str]:
    """Every name `create_backbone` knows."""
    return sorted(_BUILDERS)


def create_backbone(
    name: str, *, embedding_dim: int = 512, image_size: int = 112, compile: bool = False, **overrides: Any
) -> nn.Module:
    """A freshly initialised backbone: `[B, 3, image_size, image_size]` float (RGB, (x - 127.5) / 127.5) -> `[B,
    embedding_dim]` float32.

    The embedding is not normalised. Built on the current default device, so `with torch.device("meta")` costs no
    memory. `overrides` are arguments of the network's class (`depth`, `dim`, `drop_path`, `mask_ratio`,
    `checkpoint_blocks`, ...). `compile` hands the whole network to torch.compile in place: parameter names stay as
    they are; rounding differs, see tools/results/backbone.md. Raises UserError for an unknown name or
    override, and a value that the argument's type does not allow.
    """
    if name not in _BUILDERS:
        near = difflib.get_close_matches(name, _BUILDERS, n=1)
        raise UserError(
            f"backbone {name!r} is unknown; "
            + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(backbone_names())}")
        )
    builder = _BUILDERS[name]
    valid = _arguments(builder)
    for key in overrides:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(valid)}"
            raise UserError(f"backbone {name}: unknown argument {key!r}; {hint}")
        try:
            overrides[key] = TypeAdapter(valid[key]).validate_python(overrides[key])
        except ValidationError as error:
            raise UserError(f"backbone {name}: {key}: {error.errors()[0]['msg']}, got {overrides[key]!r}") from error
    backbone = builder(embedding_dim=embedding_dim, image_size=image_size, **overrides)
    if compile:
        backbone.compile()
    return backbone


def _arguments(builder: Callable[..., nn.Module]) -> dict[str, Any]:
    """The keyword arguments of a network's class and their types, those it passes on to its base class included."""
    cls: Any = builder.func if isinstance(builder, partial) else builder
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if base is nn.Module:
            break
        types = get_type_hints(base.__init__, include_extras=True)
        parameters = inspect.signature(base.__init__).parameters.items()
        found |= {name: types[name] for name, kind in parameters if kind.kind is kind.KEYWORD_ONLY}
    return found
