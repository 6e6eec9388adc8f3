"""The names under which backbones are known, and how each is built.

A file of this room registers its networks with `@register`. A name `family:variant` takes a member of a family whose
members are named by another library, such as `timm:resnet50`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError
from torch import nn

from lvtrain.backbones.base import Backbone
from lvtrain.errors import UserError
from lvtrain.recipe.registry import Registry

BACKBONES: Registry[partial[Backbone]] = Registry("backbone", "lvtrain.backbones")
Class = TypeVar("Class", bound=type[Backbone])


def register(name: str, **arguments: Any) -> Callable[[Class], Class]:
    """Decorator: the class with these arguments is the backbone `name`. Give it once for every published size."""

    def enter(cls: Class) -> Class:
        BACKBONES.register(name)(partial(cls, **arguments))
        return cls

    return enter


def published_sizes(cls: type[Backbone]) -> dict[str, dict[str, Any]]:
    """The arguments that `register` was given for this class, by name."""
    return {name: builder.keywords for name, builder in BACKBONES.entries().items() if builder.func is cls}


def backbone_classes() -> list[type[Backbone]]:
    """Every registered class, once."""
    return list(dict.fromkeys(builder.func for builder in BACKBONES.entries().values()))  # type: ignore[misc]


def compiles_whole(name: str) -> bool:
    """Whether torch.compile makes one graph of this backbone, see `Backbone`."""
    return bool(BACKBONES.get(name.partition(":")[0]).func.compiles_whole)  # type: ignore[attr-defined]


def create_backbone(
    name: str, *, embedding_dim: int = 512, image_size: int = 112, compile: bool = False, **overrides: Any
) -> Backbone:
    """A freshly initialised backbone.

    Its input is `[B, 3, image_size, image_size]` float (RGB, (x - 127.5) / 127.5), its output `[B, embedding_dim]`
    float32, not normalised. It is built on the current default device, so `with torch.device("meta")` costs no memory.

    Args:
        name: a registered name, or `family:variant`.
        embedding_dim: width of the embedding.
        image_size: side of the images, in pixels.
        compile: torch.compile, in place, block by block (`Backbone.compile`). Parameter names stay; rounding differs
            (tools/results/backbone.md).
        overrides: further arguments of the network's class, such as `depth`, `drop_path` or `checkpoint_blocks`.

    Raises:
        UserError: an unknown name or override, or a value that the argument's type does not allow.
    """
    family, _, variant = name.partition(":")
    builder = BACKBONES.get(family)
    valid = _arguments(builder)
    if variant:
        if "variant" not in valid:
            raise UserError(f"backbone {name}: {family} has no variants; write backbone.name={family}")
        overrides = {**overrides, "variant": variant}
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


def _arguments(builder: partial[Backbone]) -> dict[str, Any]:
    """The keyword arguments of a network's class and their types, those it passes on to its base classes included."""
    found: dict[str, Any] = {}
    for base in builder.func.__mro__:  # type: ignore[attr-defined]
        if base is nn.Module:
            break
        types = get_type_hints(base.__init__, include_extras=True)
        parameters = inspect.signature(base.__init__).parameters.items()
        found |= {name: types[name] for name, kind in parameters if kind.kind is kind.KEYWORD_ONLY}
    return found
