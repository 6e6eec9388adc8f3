"""BatchNorms that were folded away: the same embeddings in evaluation, and a network that still knows its images in training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lvtrain.backbones import create_backbone
from lvtrain.weights.norms import folded_norms, restore_statistics

IMAGES = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def folded() -> nn.Module:
    """A MobileFaceNet whose statistics fit its images, and whose convolutions then took their BatchNorms in (torch's own fusion)."""
    torch.manual_seed(0)
    backbone = create_backbone("mobilefacenet", blocks=(2, 1, 1, 1), scale=1, embedding_dim=16, image_size=32).train()
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.2, 3)
            nn.init.normal_(module.bias)
    with torch.no_grad():
        backbone(IMAGES)
    backbone.eval()
    for layers in [module for module in backbone.modules() if isinstance(module, nn.Sequential)]:
        for layer, norm in zip(list(layers), list(layers)[1:]):
            if not isinstance(layer, nn.Conv2d):
                continue
            fused = nn.utils.fuse_conv_bn_eval(layer, norm)
            layer.weight = fused.weight
            zero = torch.zeros_like(norm.running_mean)
            tensors = {"weight": zero + 1, "bias": fused.bias, "running_mean": zero, "running_var": zero + 1 - norm.eps}
            norm.load_state_dict(tensors, strict=False)
    return backbone


@torch.no_grad()
def agreement(backbone: nn.Module, expected: torch.Tensor) -> float:
    """Mean cosine of the embeddings in training mode to those of evaluation."""
    got = backbone.train()(IMAGES)
    return float(F.cosine_similarity(got, expected).mean())


@torch.no_grad()
def test_statistics_keep_the_network_in_evaluation_and_in_training() -> None:
    backbone = folded()
    expected = backbone(IMAGES)
    names = set(folded_norms(backbone))
    assert len(names) == sum(isinstance(module, nn.Conv2d) for module in backbone.modules())
    assert "features.layers.3" not in names

    forgetful = folded()
    assert agreement(forgetful, expected) < 0.9
    assert set(restore_statistics(backbone, IMAGES.split(24))) == names
    assert not backbone.training and folded_norms(backbone) == {}
    assert torch.allclose(backbone(IMAGES), expected, atol=1e-5 * float(expected.abs().max()))
    assert agreement(backbone, expected) > 0.999


@torch.no_grad()
def test_statistics_are_those_of_the_layers_input() -> None:
    backbone = folded()
    first = backbone.layers[0].layers
    x = first[0](IMAGES)
    restore_statistics(backbone, IMAGES.split(10))
    assert torch.allclose(first[1].running_mean, x.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(first[1].running_var, x.var((0, 2, 3), unbiased=False), rtol=1e-4)


def test_a_fresh_network_has_no_folded_norms() -> None:
    assert folded_norms(create_backbone("iresnet18", image_size=32)) == {}
