"""MobileFaceNet: arcface_torch's layout, its sums in plain functions, and what the registry lets one change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lvtrain.backbones import create_backbone
from lvtrain.weights.architecture import Architecture, recognise


def random_statistics(backbone: torch.nn.Module) -> dict[str, torch.Tensor]:
    state = backbone.state_dict()
    for name, value in state.items():
        if name.endswith("running_mean"):
            value.normal_()
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2)
    return state


@pytest.mark.parametrize(
    ("name", "parameters", "last"),
    [
        # counted in arcface_torch's own modules
        ("mobilefacenet", 2_059_520, "layers.7.layers.1.layers.2.layers.1.running_var"),
        ("mobilefacenet_large", 6_314_880, "layers.7.layers.3.layers.2.layers.1.running_var"),
    ],
)
def test_layout(name: str, parameters: int, last: str) -> None:
    with torch.device("meta"):
        backbone = create_backbone(name)
    state = backbone.state_dict()
    assert sum(parameter.numel() for parameter in backbone.parameters()) == parameters
    assert {
        last,
        "layers.1.layers.0.weight" if name == "mobilefacenet" else "layers.1.layers.1.layers.0.layers.2.weight",
    } <= set(state)
    assert tuple(state["features.layers.0.layers.0.weight"].shape) == (512, 1, 7, 7)
    assert "features.layers.2.bias" not in state and tuple(state["features.layers.3.weight"].shape) == (512,)


@pytest.mark.parametrize("first", [1, 2])
def test_network_in_plain_functions(first: int) -> None:
    torch.manual_seed(0)
    blocks, scale = (first, 1, 2, 1), 1
    backbone = create_backbone("mobilefacenet", blocks=blocks, scale=scale, image_size=32, embedding_dim=8).double()
    w = random_statistics(backbone.eval())

    def conv(x: torch.Tensor, name: str, stride: int = 1, pad: int = 0) -> torch.Tensor:
        weight = w[f"{name}.layers.0.weight"]
        x = F.conv2d(x, weight, None, stride, pad, groups=x.shape[1] // weight.shape[1])
        x = norm(x, f"{name}.layers.1")
        slope = f"{name}.layers.2.weight"
        return torch.where(x > 0, x, x * w[slope].view(1, -1, 1, 1)) if slope in w else x

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        names = [f"{name}.{what}" for what in ("running_mean", "running_var", "weight", "bias")]
        mean, variance, weight, bias = (w[n].view(1, -1, *[1] * (x.ndim - 2)) for n in names)
        return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias

    def bottleneck(x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        x = conv(conv(x, f"{name}.layers.0"), f"{name}.layers.1", stride, 1)
        return conv(x, f"{name}.layers.2")

    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    x = conv(images, "layers.0", 2, 1)
    for stage, count in enumerate(blocks):
        if stage:
            x = bottleneck(x, f"layers.{2 * stage}", 2)
        if stage == 0 and count == 1:
            x = conv(x, "layers.1", 1, 1)
            continue
        for block in range(count):
            x = x + bottleneck(x, f"layers.{2 * stage + 1}.layers.{block}")
    x = conv(x, "conv_sep")
    assert torch.allclose(backbone.tokens(images)[0], x.flatten(2).mT, rtol=1e-10)
    x = conv(x, "features.layers.0").flatten(1) @ w["features.layers.2.weight"].T
    assert torch.allclose(backbone(images), norm(x, "features.layers.3"), rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("mobilefacenet", {}),
        ("mobilefacenet_large", {}),
        ("mobilefacenet", {"blocks": (2, 8, 12, 4), "scale": 2}),
        ("mobilefacenet", {"blocks": (1, 3, 1, 1), "scale": 1}),
    ],
)
def test_is_recognised_by_its_weights(name: str, overrides: dict[str, object]) -> None:
    with torch.device("meta"):
        state = create_backbone(name, embedding_dim=24, image_size=64, **overrides).state_dict()
    assert recognise(state) == Architecture(name, 24, 64, overrides)


def test_recomputing_blocks_gives_the_same_gradients() -> None:
    found = []
    for mode in ("none", "block"):
        torch.manual_seed(0)
        backbone = create_backbone("mobilefacenet", checkpoint_blocks=mode, image_size=32, embedding_dim=16).train()
        (backbone(torch.randn(3, 3, 32, 32)) ** 3).mean().backward()
        found.append({name: value.grad for name, value in backbone.named_parameters()})
    kept, recomputed = found
    assert all(torch.equal(gradient, recomputed[name]) for name, gradient in kept.items())
