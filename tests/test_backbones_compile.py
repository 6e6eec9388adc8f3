"""torch.compile takes every backbone as one graph: no operation that is left to Python, forward and backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lvtrain.backbones import BACKBONES, create_backbone
from tests.fakecuda.device import FakeDevice

_VIT = {"dim": 32, "depth": 2, "heads": 2, "mask_ratio": 0.25, "drop_path": 0.1}
_FVIT = {"dim": 32, "depth": 2, "heads": 2, "head_dim": 16, "mlp_dim": 64}
# one of each class, small: a larger one repeats the same blocks
SMALL: dict[str, dict[str, Any]] = {
    "vit_nano": _VIT,
    "fvit_tiny": _FVIT,
    "part_fvit_tiny": _FVIT,
    "dino_vit_tiny": {"depth": 2},
    "iresnet18": {},
    "mobilefacenet": {},
    "mobilenet": {},
    "timm:resnet18": {},
}


def test_one_of_each_class_is_here() -> None:
    builders = {BACKBONES.get(name.partition(":")[0]).func for name in SMALL}
    assert builders == {builder.func for builder in BACKBONES.entries().values()}


@pytest.mark.parametrize("name", SMALL)
def test_one_graph(name: str) -> None:
    torch._dynamo.reset()
    backbone = create_backbone(name, embedding_dim=32, **SMALL[name]).train()
    compiled = torch.compile(backbone, fullgraph=True, backend="eager")  # raises at a graph break
    size = backbone.image_size
    compiled(torch.randn(4, 3, size, size)).square().mean().backward()
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)


@pytest.mark.fakecuda
@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_inductor_compiles_it_for_sm_90(fake_device: FakeDevice, tmp_path: Path, name: str) -> None:
    ended = fake_device.call(f"{__name__}:compile_on_the_device", name, folder=tmp_path)
    assert ended.code == 0, ended.output[-4000:]
    assert any(call.kind == "launch" and call.text.startswith("triton_") for call in ended.trace())


def compile_on_the_device(name: str) -> None:
    backbone = create_backbone(name, embedding_dim=32, **SMALL[name]).to("cuda").train()
    compiled = torch.compile(backbone, fullgraph=True)
    size = backbone.image_size
    with torch.autocast("cuda", torch.bfloat16):
        embedding = compiled(torch.zeros(4, 3, size, size, device="cuda"))
    embedding.square().mean().backward()
