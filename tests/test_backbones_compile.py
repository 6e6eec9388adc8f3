"""torch.compile takes every backbone block by block, and no operation is left to Python, forward and backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torch._dynamo.utils import counters

from lvtrain.backbones import BACKBONES, Backbone, create_backbone
from lvtrain.backbones.compiled import share_drop_paths
from tests.fakecuda.device import FakeDevice

BETWEEN_BLOCKS = "the blocks are compiled one by one"  # why torch.compile stops there
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


def compile_and_train(name: str, **changes: Any) -> tuple[int, dict[str, torch.Tensor]]:
    """How many graphs one step takes, and its gradients. No operation is left to Python."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    backbone = create_backbone(name, embedding_dim=32, **SMALL[name] | changes).train()
    backbone.compile(backend="eager")
    found = gradients(backbone)
    assert all(BETWEEN_BLOCKS in reason for reason in counters["graph_break"])
    assert bool(counters["graph_break"]) != backbone.compiles_whole
    return counters["stats"]["unique_graphs"], found


def gradients(backbone: Backbone) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    size = backbone.image_size
    backbone(torch.randn(4, 3, size, size)).square().mean().backward()
    return {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", SMALL)
def test_no_graph_breaks_except_between_blocks(name: str) -> None:
    graphs, found = compile_and_train(name)
    expected = create_backbone(name, embedding_dim=32, **SMALL[name]).named_parameters()
    assert found.keys() == {name for name, p in expected if p.requires_grad}
    if "depth" in SMALL[name]:  # the first block has no stochastic depth, the others share a graph
        assert graphs <= 4 and compile_and_train(name, depth=4)[0] == graphs


@pytest.mark.parametrize("recompute", ["none", "activation", "block"])
def test_the_same_gradients(recompute: str) -> None:
    changes = {"drop_path": 0.0, "checkpoint_blocks": recompute}
    torch.manual_seed(0)
    eager = gradients(create_backbone("vit_nano", embedding_dim=32, **SMALL["vit_nano"] | changes).train())
    _, compiled = compile_and_train("vit_nano", **changes)
    assert compiled.keys() == eager.keys()
    assert all(torch.equal(compiled[name], eager[name]) for name in eager)


def test_drop_path_keeps_the_mean() -> None:
    network = nn.Sequential(DropPath(0.25), DropPath(0.0)).append(nn.Linear(1, 1)).train()
    share_drop_paths(network)
    assert isinstance(network[1], DropPath) and not network.state_dict().keys() - {"2.weight", "2.bias"}
    found = network[0](torch.ones(4000, 3))
    assert set(found.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (found == found[:, :1]).all() and found.mean() == pytest.approx(1, abs=0.05)
    assert network.eval()[0](found) is found


@pytest.mark.fakecuda
@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_inductor_compiles_it_for_sm_90(fake_device: FakeDevice, tmp_path: Path, name: str) -> None:
    ended = fake_device.call(f"{__name__}:compile_on_the_device", name, folder=tmp_path)
    assert ended.code == 0, ended.output[-4000:]
    assert any(call.kind == "launch" and call.text.startswith("triton_") for call in ended.trace())


def compile_on_the_device(name: str) -> None:
    torch.use_deterministic_algorithms(True)  # as in training; inductor then compiles one variant of each sum
    backbone = create_backbone(name, embedding_dim=32, **SMALL[name]).to("cuda").train()
    backbone.compile()
    size = backbone.image_size
    with torch.autocast("cuda", torch.bfloat16):
        embedding = backbone(torch.zeros(4, 3, size, size, device="cuda"))
    embedding.square().mean().backward()
    assert all(BETWEEN_BLOCKS in reason for reason in counters["graph_break"]), counters["graph_break"]
