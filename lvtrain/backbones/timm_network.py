"""Any network of timm as a backbone: `timm:resnet50`, `timm:vit_base_patch16_224`.

    images -> timm's network without its classifier, pooled as timm pools it -> Linear -> BatchNorm -> embedding

The linear layer and BatchNorm are those that end `vit_*`. timm's own names say which parameter is in which layer
(`group_matcher`), for layer decay. Pretrained weights are never fetched: give a file, `init_from: FILE`.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from typing import Any

import timm
import torch
from pydantic import PositiveInt
from timm.layers import trunc_normal_
from timm.models import group_parameters
from torch import nn

from lvtrain.backbones.base import Backbone
from lvtrain.backbones.layers import Float32BatchNorm1d
from lvtrain.backbones.memory import Recompute
from lvtrain.backbones.registry import register
from lvtrain.errors import UserError

_NETWORK = "network."  # how the names of timm's own tensors begin here


@register("timm")
class TimmNetwork(Backbone):
    """`[B, 3, image_size, image_size]` float -> `[B, embedding_dim]` float32, not normalised.

    Args:
        variant: timm's name of the network; `backbone.name: timm:VARIANT` gives it.
        arguments: for timm's constructor, such as `{drop_path_rate: 0.1}`.
        image_size: networks that are built for one size are built for this one.
        checkpoint_blocks: `none` or `block`, which is timm's `set_grad_checkpointing`.

    Raises:
        UserError: timm does not know the network or an argument, or it does not take images of this size.
    """

    first_names = ()
    undecayed = ()
    compiles_whole = True  # timm's own forward runs its blocks

    def __init__(
        self,
        *,
        variant: str = "",
        arguments: dict[str, Any] | None = None,
        checkpoint_blocks: Recompute = "none",
        checkpoint_every: PositiveInt = 1,
        **backbone: Any,
    ) -> None:
        super().__init__(**backbone)
        if checkpoint_blocks == "activation" or checkpoint_every != 1:
            raise UserError("backbone timm: checkpoint_blocks is none or block, and checkpoint_every 1")
        self.variant = variant
        create = _constructor(variant, self.image_size, arguments or {})
        width = self._measure(create)
        self.network = create()
        self.feature = nn.Sequential(
            nn.Linear(width, self.embedding_dim, bias=False), Float32BatchNorm1d(self.embedding_dim, eps=2e-5)
        )
        trunc_normal_(self.feature[0].weight, std=0.02)
        self._layers: dict[str, int] = group_parameters(
            self.network, self.network.group_matcher(coarse=False), reverse=True
        )
        undecayed = self.network.no_weight_decay() if hasattr(self.network, "no_weight_decay") else ()
        self.undecayed = tuple(sorted({name.rpartition(".")[2] for name in undecayed}))
        self.takes_any_size = not _is_for_one_size(variant)
        self.recompute(checkpoint_blocks)

    def _measure(self, create: Any) -> int:
        """Sets `dim` and `num_tokens`; returns the width of the pooled features. Runs a copy without memory."""
        try:
            with torch.device("meta"):
                probe = create().eval()
                images = torch.empty(1, 3, self.image_size, self.image_size)
                tokens = _tokens(probe, probe.forward_features(images))
                width: int = probe(images).shape[1]
        except UserError:
            raise
        except Exception as error:  # whatever its layers say of a size that they cannot take
            raise UserError(
                f"backbone timm:{self.variant} cannot be built for images of {self.image_size} pixels: {error}"
            ) from error
        self.num_tokens, self.dim = tokens.shape[1:]
        return width

    @property
    def num_blocks(self) -> int:
        return max(self._layers.values(), default=0)

    def layer_of(self, name: str) -> int:
        return self._layers.get(name.removeprefix(_NETWORK), self.num_blocks + 1)

    def recompute(self, mode: Recompute) -> None:
        super().recompute(mode)
        self.network.set_grad_checkpointing(mode == "block")

    def adopt(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Converts a state dict of timm by timm's own rule (position embeddings are resized). Drops timm's classifier."""
        if any(name.startswith(_NETWORK) for name in state):
            return dict(state)
        convert = getattr(sys.modules[type(self.network).__module__], "checkpoint_filter_fn", None)
        own = self.network.state_dict()
        converted = convert(dict(state), self.network) if convert else state
        return {_NETWORK + name: tensor for name, tensor in converted.items() if name in own}

    def forward(self, images: torch.Tensor, return_tokens: bool = False) -> Any:
        """Embeddings `[B, embedding_dim]`, or with `return_tokens` `(tokens [B, num_tokens, dim], embeddings)`."""
        images = images.contiguous(memory_format=torch.channels_last)
        if not return_tokens:
            return self.feature(self.network(images)).float()
        features = self.network.forward_features(images)
        return _tokens(self.network, features), self.feature(self.network.forward_head(features)).float()


def _constructor(variant: str, image_size: int, arguments: dict[str, Any]) -> Any:
    if not variant:
        raise UserError("backbone timm: name the network, as in backbone.name=timm:resnet50")
    if not timm.is_model(variant):
        near = difflib.get_close_matches(variant, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(f'timm:{name}' for name in near)}?" if near else "see timm.list_models()"
        raise UserError(f"backbone timm:{variant}: timm has no such network; {hint}")
    if _is_for_one_size(variant):
        arguments = {"img_size": image_size} | arguments

    def create() -> Any:
        try:
            return timm.create_model(variant, pretrained=False, num_classes=0, **arguments)
        except TypeError as error:
            raise UserError(f"backbone timm:{variant}: backbone.overrides.arguments: {error}") from error

    return create


def _is_for_one_size(variant: str) -> bool:
    configuration = timm.get_pretrained_cfg(variant)
    return configuration is not None and configuration.fixed_input_size


def _tokens(network: Any, features: torch.Tensor) -> torch.Tensor:
    """What `forward_features` gives, as `[B, N, dim]`: patches without prefix tokens, or positions of a feature map."""
    if features.ndim == 3:
        return features[:, getattr(network, "num_prefix_tokens", 0) :]
    return features.flatten(1, 2) if getattr(network, "output_fmt", "NCHW") == "NHWC" else features.flatten(2).mT
