"""Converts weights of other code to our names and RGB: the IResNets of AdaFace and CVLface, and networks for BGR."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch

from lvtrain.errors import UserError

_STEM = {"input_layer.0": "conv1", "input_layer.1": "bn1", "input_layer.2": "prelu"}
_HEAD = {"output_layer.0": "bn2", "output_layer.3": "fc", "output_layer.4": "features"}
_BLOCK = {f"res_layer.{i}": name for i, name in enumerate(("bn1", "conv1", "bn2", "prelu", "conv2", "bn3"))}
_BLOCK |= {"shortcut_layer.0": "downsample.0", "shortcut_layer.1": "downsample.1"}
_LAYER_OF_WIDTH = {64: 1, 128: 2, 256: 3, 512: 4}


def is_ir(state: Mapping[str, torch.Tensor]) -> bool:
    """AdaFace's and CVLface's `Backbone`: input_layer, body, output_layer."""
    return "input_layer.0.weight" in state and "body.0.res_layer.1.weight" in state


def from_ir(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """AdaFace's and CVLface's names -> ours (arcface_torch's); the last BatchNorm, which they leave without weight and bias, gets 1 and 0.

    Raises:
        UserError: squeeze-and-excite or bottleneck blocks (IR-SE, IR-152, IR-200), for which there is no backbone here.
    """
    if any(".se_block." in name or ".res_layer.8." in name for name in state):
        raise UserError(
            "an IResNet with squeeze-and-excite or bottleneck blocks (IR-SE, IR-152, IR-200); known are IR-18, -34, -50 and -101"
        )
    bodies = sorted({int(match[1]) for name in state if (match := re.match(r"body\.(\d+)\.", name))})
    where, counts = {}, dict.fromkeys(_LAYER_OF_WIDTH.values(), 0)
    for body in bodies:
        layer = _LAYER_OF_WIDTH.get(state[f"body.{body}.res_layer.1.weight"].shape[0], 0)
        if not layer:
            raise UserError(
                f"body.{body} has {state[f'body.{body}.res_layer.1.weight'].shape[0]} channels; an IResNet has 64 to 512"
            )
        where[body] = f"layer{layer}.{counts[layer]}"
        counts[layer] += 1
    renamed = {_ir_name(name, where): tensor for name, tensor in state.items()}
    width = renamed["features.running_mean"]
    return {"features.weight": torch.ones_like(width), "features.bias": torch.zeros_like(width), **renamed}


def _ir_name(name: str, where: Mapping[int, str]) -> str:
    module, _, tensor = name.rpartition(".")
    if match := re.match(r"body\.(\d+)\.(.+)", module):
        return f"{where[int(match[1])]}.{_BLOCK[match[2]]}.{tensor}"
    return f"{(_STEM | _HEAD)[module]}.{tensor}"


def swap_colours(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same network for images with red and blue exchanged; twice is the identity. Every layer that sees pixels is changed.

    Raises:
        UserError: the names and shapes do not show which layers these are.
    """
    return _by_colour(state, lambda weight: weight.flip(1))


def scale_pixels(state: Mapping[str, torch.Tensor], factors: Sequence[float]) -> dict[str, torch.Tensor]:
    """The same network for images whose three channels, in the network's order, have been divided by `factors`.

    Raises:
        UserError: as `swap_colours`.
    """
    return _by_colour(state, lambda weight: weight * torch.tensor(factors, dtype=weight.dtype).view(1, 3, 1, 1))


def _by_colour(
    state: Mapping[str, torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """With `change` on the weights `[n, 3, ...]` of the layers that see pixels."""
    changed = dict(state)
    names = [name for name in _SEES_PIXELS if name in state and state[name].ndim == 4 and state[name].shape[1] == 3]
    if _PATCHES in state:  # [dim, patch * patch * 3], colour last
        patches = state[_PATCHES].unflatten(1, (-1, 3)).transpose(1, 2).unsqueeze(-1)
        changed[_PATCHES] = change(patches).squeeze(-1).transpose(1, 2).flatten(1)
    elif not names:
        names = [name for name, tensor in state.items() if tensor.ndim == 4 and tensor.shape[1] == 3]
        if len(names) != 1:
            raise UserError(
                f"{len(names)} layers could take the image; colours and range of these weights cannot be changed"
            )
    return changed | {name: change(state[name]) for name in names}


_PATCHES = "patch_to_embedding.weight"
_SEES_PIXELS = (
    "patch_embed.proj.weight",
    "conv1.weight",
    "layers.0.layers.0.weight",
    "stem.0.weight",
    "stn.conv_stem.weight",
    "stn.features.0.0.weight",
)
