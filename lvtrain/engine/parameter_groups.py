"""Which parameter gets which weight decay and learning rate, decided by name.

Under ZeRO-3 every parameter looks one-dimensional once DeepSpeed has split it. Grouping by `ndim` there would put all of
them into the group without weight decay.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lvtrain.backbones import Backbone
from lvtrain.recipe.optimizer import Optimizer


@dataclass(frozen=True)
class Group:
    """Parameters that share whether weight decay acts on them, and `lr_scale`, the factor on the schedule's rate."""

    name: str
    parameters: tuple[str, ...]
    decayed: bool
    lr_scale: float


def parameter_groups(module: nn.Module, optimizer: Optimizer) -> list[Group]:
    """The groups of `module`'s trainable parameters, in a fixed order.

    Norms, biases, other vectors, position embeddings and tokens get no weight decay (unless `decay_norms`). With
    `layer_decay` d, block i of n learns at d^(n - i), what stands before the blocks at d^(n + 1), and what follows them
    at 1 (BEiT, MAE). The backbone says which parameter is where (`Backbone.layer_of`).

    Raises:
        ValueError: nothing is trainable.
    """
    trainable = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("no parameter of the module requires a gradient")
    prefix, backbone = _backbone(module)
    depth = backbone.num_blocks if backbone else 0
    members: dict[tuple[int, bool], list[str]] = {}
    for name, parameter in trainable:
        own = name.removeprefix(prefix) if backbone and name.startswith(prefix) else None  # its name in the backbone
        layer = 0
        if optimizer.layer_decay is not None:
            layer = depth + 1 if backbone is None or own is None else backbone.layer_of(own)
        undecayed = backbone.undecayed if backbone and own is not None else ()
        is_vector = parameter.ndim <= 1 or name.rpartition(".")[2] in ("bias", *undecayed)
        decayed = optimizer.decay_norms or not is_vector
        members.setdefault((layer, decayed), []).append(name)
    groups = []
    for (layer, decayed), names in sorted(members.items(), key=lambda item: (item[0][0], not item[0][1])):
        label = "decay" if decayed else "no_decay"
        scale = 1.0
        if optimizer.layer_decay is not None:
            label, scale = f"layer_{layer:02d}.{label}", optimizer.layer_decay ** (depth + 1 - layer)
        groups.append(Group(label, tuple(names), decayed, scale))
    return groups


def _backbone(module: nn.Module) -> tuple[str, Backbone | None]:
    """The backbone in `module`, and how names of its parameters begin there; `("", None)` where there is none."""
    for name, part in module.named_modules():
        if isinstance(part, Backbone):
            return f"{name}." if name else "", part
    return "", None
