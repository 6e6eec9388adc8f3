"""Which parameter gets which weight decay and learning rate, decided by name.

By name and not by what DeepSpeed leaves of a parameter: under ZeRO-3 every parameter looks one-dimensional, and grouping by `ndim` there
puts all of them into the group without decay.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from lvtrain.recipe.sections import Optimizer

_TOKENS = ("pos_embed", "pos_embedding", "mask_token", "cls_token", "reg_token")
_FIRST = (*_TOKENS, "patch_embed", "patch_to_embedding", "stn", "output_layer")  # the last two: LAFS's landmark CNN
# timm's and arcface_torch's `blocks.i`, LAFS's `transformer.layers.i`; not the blocks of the landmark CNN, which is no layer of the transformer
_BLOCK = re.compile(r"(?:^|(?<!stn)\.)(?:blocks|transformer\.layers)\.(\d+)\.")


@dataclass(frozen=True)
class Group:
    """Parameters that share whether weight decay acts on them, and `lr_scale`, the factor on the schedule's rate."""

    name: str
    parameters: tuple[str, ...]
    decayed: bool
    lr_scale: float


def parameter_groups(module: nn.Module, optimizer: Optimizer) -> list[Group]:
    """The groups of `module`'s trainable parameters, in a fixed order.

    Norms, biases, other vectors, position embeddings and tokens are not decayed (unless `decay_norms`). With `layer_decay` d, block i of n
    learns at d^(n - i), embeddings and tokens at d^(n + 1), what follows the blocks at 1 (BEiT, MAE; embeddings count as layer 0). A landmark CNN,
    which stands before them, counts as layer 0 too, as in LAFS's released code (the paper does not say).

    Raises:
        ValueError: nothing is trainable.
    """
    trainable = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("no parameter of the module requires a gradient")
    blocks = [int(match[1]) for name, _ in trainable if (match := _BLOCK.search(name))]
    depth = max(blocks) + 1 if blocks else 0
    members: dict[tuple[int, bool], list[str]] = {}
    for name, parameter in trainable:
        layer = _layer(name, depth) if optimizer.layer_decay is not None else 0
        decayed = optimizer.decay_norms or not (parameter.ndim <= 1 or name.rpartition(".")[2] in ("bias", *_TOKENS))
        members.setdefault((layer, decayed), []).append(name)
    groups = []
    for (layer, decayed), names in sorted(members.items(), key=lambda item: (item[0][0], not item[0][1])):
        label = "decay" if decayed else "no_decay"
        scale = 1.0
        if optimizer.layer_decay is not None:
            label, scale = f"layer_{layer:02d}.{label}", optimizer.layer_decay ** (depth + 1 - layer)
        groups.append(Group(label, tuple(names), decayed, scale))
    return groups


def _layer(name: str, depth: int) -> int:
    if match := _BLOCK.search(name):
        return int(match[1]) + 1
    return 0 if any(part in _FIRST for part in name.split(".")) else depth + 1
