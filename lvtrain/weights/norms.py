"""Gives training statistics to BatchNorms that an ONNX export folded away.

A folded BatchNorm is read as x + b (mean 0, variance 1 - eps, weight 1, bias b). That is exact in evaluation. But in training
the layer divides by the deviation of its batch, which destroys what the network has learned. With the mean m and variance v
of x over some images, weight sqrt(v + eps) and bias b + m give the same x + b in evaluation, and nearly the same in training.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def folded_norms(backbone: nn.Module) -> dict[str, _BatchNorm]:
    """The layers that only add a bias, by name. A new BatchNorm is not one of them, because its variance is 1."""
    norms = {name: module for name, module in backbone.named_modules() if isinstance(module, _BatchNorm)}
    return {name: norm for name, norm in norms.items() if _only_adds(norm)}


def _only_adds(norm: _BatchNorm) -> bool:
    if norm.running_mean is None or norm.running_var is None or not norm.affine:
        return False
    variance = torch.full_like(norm.running_var, 1 - norm.eps)
    same = torch.equal(norm.running_var, variance) and not norm.running_mean.any()
    return bool(same and (norm.weight == 1).all())


@torch.no_grad()
def restore_statistics(backbone: nn.Module, batches: Iterable[torch.Tensor]) -> list[str]:
    """Gives the folded BatchNorms the statistics of these images (`[B, 3, S, S]`, normalised). Returns their names.

    One pass is enough: a folded layer's output in evaluation does not change, so the inputs of later layers do not
    change either.
    """
    norms = folded_norms(backbone)
    sums = {name: torch.zeros(3, norm.num_features, dtype=torch.float64) for name, norm in norms.items()}

    def add(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].double().transpose(0, 1).flatten(1)
        sums[name] += torch.stack([torch.full_like(x[:, 0], x.shape[1]), x.sum(1), x.square().sum(1)]).cpu()

    hooks = [norm.register_forward_pre_hook(partial(add, name)) for name, norm in norms.items()]
    was_training = backbone.training
    backbone.eval()
    try:
        for images in batches:
            backbone(images)
    finally:
        backbone.train(was_training)
        for hook in hooks:
            hook.remove()
    for name, norm in norms.items():
        count, total, squares = sums[name]
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_((variance + norm.eps).sqrt())
        norm.bias.add_(mean.to(norm.bias))
    return list(norms)
