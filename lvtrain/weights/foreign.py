"""Converts weights of other code to our names and RGB: the IResNets of AdaFace and CVLface, and networks for BGR."""

from __future__ import annotations

import re
from collections.abc import Mapping

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
    """The same network for images with red and blue exchanged; twice is the identity. Every layer that sees pixels is changed."""
    swapped = dict(state)
    for name, tensor in state.items():
        if name == "patch_to_embedding.weight":  # [dim, patch * patch * 3], colour last
            swapped[name] = tensor.unflatten(1, (-1, 3)).flip(2).flatten(1)
        elif tensor.ndim == 4 and tensor.shape[1] == 3 and name in _SEES_PIXELS:
            swapped[name] = tensor.flip(1)
    return swapped


_SEES_PIXELS = ("patch_embed.proj.weight", "conv1.weight", "stn.conv_stem.weight", "stn.features.0.0.weight")
