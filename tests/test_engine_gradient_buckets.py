"""Gradients summed while the backward pass computes, against DeepSpeed's own sum after it, on 1, 2 and 4 ranks."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lvtrain.engine import engine as engines
from lvtrain.engine.engine import Engine, resolve_ds_config
from lvtrain.engine.optimizers.adamw import AdamWSection
from tests.ranks import run_ranks

WIDTH, STEPS, MICRO_BATCHES = 24, 3, 4
SMALL = 1500  # elements of a bucket; the network has 5 of them
SETTINGS = [(1, "float32", "fp32"), (2, "bfloat16", "fp32"), (2, "bfloat16", "bf16")]  # stage, arithmetic, what is sent


class Net(nn.Module):
    """Weights and biases (two groups), one parameter larger than a bucket, one that no loss depends on, one frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.large = nn.Linear(WIDTH, 80)
        self.middle = nn.ModuleList(nn.Linear(80 if i == 0 else WIDTH, WIDTH) for i in range(4))
        self.middle[0].unused = nn.Parameter(torch.ones(5))
        self.frozen = nn.Parameter(torch.ones(WIDTH), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.large(x)
        for layer in self.middle:
            x = nn.functional.gelu(layer(x))
        return x * self.frozen


def build(size: int, overlap: bool | None, stage: int, precision: str, wire: str) -> Engine:
    optimizer = AdamWSection.model_validate({"precision": precision, "clip": 1.0})
    zero = {"stage": stage, "reduce_bucket_size": SMALL} | ({} if overlap is None else {"overlap_comm": overlap})
    config = resolve_ds_config({"zero_optimization": zero, "communication_data_type": wire}, optimizer=optimizer)
    settings: dict[str, Any] = {"micro_batch": 4, "accumulation": MICRO_BATCHES // size, "optimizer": optimizer}
    return Engine(Net(), ds_config=config, device=torch.device("cpu"), **settings)


def train(engine: Engine, rank: int) -> dict[str, torch.Tensor]:
    for step in range(STEPS):
        for micro in range(engine.accumulation):
            seed = 100 * step + rank * engine.accumulation + micro
            x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed))
            engine.backward(engine(x).float().pow(2).mean())
        engine.step(1e-2, torch.tensor(1.0))
    state = {name: saved.tensor for name, saved in engine.export_state().items()}
    engine.close()
    return state


def every_way(rank: int, size: int) -> list[dict[str, dict[str, torch.Tensor]]]:
    found = []
    for setting in SETTINGS:
        ways = {
            name: train(build(size, overlap, *setting), rank) for name, overlap in (("early", None), ("late", False))
        }
        with mock.patch.object(engines, "GradientBuckets"):
            ways["DeepSpeed"] = train(build(size, False, *setting), rank)
        found.append(ways)
    return found


def begun(rank: int, size: int) -> list[tuple[str, int]]:
    """What happens in one backward pass: ("sum", elements), or ("layer", number) when a layer's backward pass begins."""
    engine = build(size, None, 1, "bfloat16", "fp32")
    seen: list[tuple[str, int]] = []
    for number, layer in enumerate(engine.module.middle):
        layer.register_full_backward_pre_hook(lambda module, gradient, number=number: seen.append(("layer", number)))
    reduce = dist.all_reduce

    def all_reduce(tensor: torch.Tensor, **settings: Any) -> Any:
        seen.append(("sum", tensor.numel()))
        return reduce(tensor, **settings)

    for _ in range(engine.accumulation):
        outputs = engine(torch.randn(4, WIDTH))
        seen.clear()
        with mock.patch.object(dist, "all_reduce", all_reduce):
            engine.backward(outputs.float().pow(2).mean())
    engine.close()
    return seen


@pytest.mark.parametrize("size", [1, 2, 4])
def test_when_gradients_are_summed_does_not_change_a_bit(size: int) -> None:
    for rank in run_ranks(size, every_way):
        for setting, ways in zip(SETTINGS, rank, strict=True):
            early, late, expected = ways["early"], ways["late"], ways["DeepSpeed"]
            assert early.keys() == expected.keys()
            for key in early:
                assert torch.equal(early[key], late[key]), (setting, key)
                # A sum of two numbers has one order. Gradients of bfloat16 arithmetic have 8 bits: float32 sums are exact.
                if size <= 2 or setting[1:] == ("bfloat16", "fp32"):
                    assert torch.equal(early[key], expected[key]), (setting, key)
                elif setting[2] == "fp32":
                    torch.testing.assert_close(early[key], expected[key], rtol=1e-4, atol=1e-5)


def test_sums_begin_before_the_backward_pass_ends() -> None:
    for seen in run_ranks(2, begun):
        layers = [place for place, (kind, _) in enumerate(seen) if kind == "layer"]
        sums = [place for place, (kind, _) in enumerate(seen) if kind == "sum"]
        assert len(layers) == 4 and len(sums) == 5
        assert sums[0] < layers[-1], seen
        trained = sum(p.numel() for p in Net().parameters() if p.requires_grad)
        assert sum(size for kind, size in seen if kind == "sum") == trained
