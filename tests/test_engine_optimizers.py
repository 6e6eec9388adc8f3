"""Backbone optimizers under every ZeRO stage: a step is torch's own, and the state survives a change of stage and of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lvtrain.engine.engine import Engine, resolve_ds_config
from lvtrain.recipe.optimizer import OPTIMIZERS
from tests.ranks import run_ranks
from tests.test_engine_state import (
    MICRO,
    STAGES,
    WAYS,
    Kept,
    Net,
    dump,
    exported,
    same_bits,
    step_data,
    train,
    with_buffers,
)
from tests.test_engine_state import V as SEEDS

MICRO_BATCHES = 4  # so that 1, 2 and 4 ranks are possible
SETTINGS: dict[str, dict[str, Any]] = {
    "nesterov": {"name": "sgd", "momentum": 0.8, "nesterov": True, "weight_decay": 0.5, "layer_decay": 0.5},
    "momentum": {"name": "sgd", "momentum": 0.9, "weight_decay": 0.1},
    "plain": {"name": "sgd", "momentum": 0.0},
}
SGD = SETTINGS["nesterov"]


def build(stage: int, size: int, settings: dict[str, Any], zero: dict[str, Any] | None = None) -> Engine:
    torch.manual_seed(0)
    section = OPTIMIZERS.get(settings["name"]).section
    optimizer = section.model_validate({"clip": 0.3, "precision": "float32"} | settings)
    config = resolve_ds_config({"zero_optimization": {"stage": stage} | (zero or {})}, optimizer=optimizer)
    accumulation, device = MICRO_BATCHES // size, torch.device("cpu")
    return Engine(
        Net(), ds_config=config, micro_batch=MICRO, accumulation=accumulation, optimizer=optimizer, device=device
    )


def by_torch(settings: dict[str, Any], steps: int) -> dict[str, torch.Tensor]:
    """`train` by torch alone: SGD with one group a parameter, clip_grad_norm_, the mean of the losses."""
    torch.manual_seed(0)
    net = Net()
    depths = {"blocks.0.0.weight": 2, "blocks.0.1": 2, "blocks.1": 1, "pos_embed": 3}
    groups = []
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            depth = next((depth for prefix, depth in depths.items() if name.startswith(prefix)), 0)
            decayed = name in ("blocks.0.0.weight", "blocks.1.weight")
            decay = settings.get("weight_decay", 5e-4) if decayed else 0.0
            rate = 1e-2 * settings.get("layer_decay", 1.0) ** depth
            groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
    sgd = torch.optim.SGD(groups, momentum=settings["momentum"], nesterov=settings.get("nesterov", False))
    for step in range(steps):
        sgd.zero_grad()
        for v in range(MICRO_BATCHES):
            x, weights = step_data(step, v)
            torch.manual_seed(step * SEEDS + v)
            ((net(x) * weights).pow(2).mean() / MICRO_BATCHES).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.3)
        sgd.step()
    weights = {f"backbone.param.{name}": weight.detach() for name, weight in net.named_parameters()}
    buffers = {
        f"backbone.momentum_buffer.{n}": sgd.state[p]["momentum_buffer"]
        for n, p in net.named_parameters()
        if p in sgd.state and settings["momentum"]
    }
    return weights | buffers


def _by_engine(rank: int, size: int) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    results = {}
    for name, settings in SETTINGS.items():
        for stage, zero in WAYS if name == "nesterov" else [(1, {}), (3, {})]:
            engine = build(stage, size, settings, zero)
            train(engine, rank, range(3))
            results[name, f"{stage} {list(zero)}"] = dump(engine)
            engine.close()
    return results


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_step_is_torchs_sgd(size: int) -> None:
    """Momentum, Nesterov, weight decay, layer-wise rates and the clip norm reach the update, under every stage and offload."""
    for results in run_ranks(size, _by_engine):
        for (name, way), state in results.items():
            expected = by_torch(SETTINGS[name], 3)
            assert {key for key in state if "momentum" in key} == {key for key in expected if "momentum" in key}
            for key, tensor in expected.items():
                torch.testing.assert_close(state[key], tensor, rtol=1e-5, atol=1e-6, msg=f"{name} {way} {key}")


def _straight(rank: int, size: int) -> dict[int, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    results = {}
    for stage in STAGES:
        engine = build(stage, size, SGD)
        train(engine, rank, range(2))
        half = with_buffers(engine)
        assert "backbone.adam_step" not in half
        train(engine, rank, range(2, 4))
        results[stage] = half, with_buffers(engine)
        engine.close()
    return results


def _resumed(
    rank: int, size: int, path: str
) -> dict[tuple[int, int, int], tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    results = {}
    # stages outermost: a ZeRO-3 engine replaces torch's linear in its process for good, whose bias gradient rounds differently
    for stage in STAGES:
        for (origin_stage, origin_size), half in torch.load(path).items():
            engine = build(stage, size, SGD)
            engine.import_state(Kept(half))
            taken = with_buffers(engine)
            train(engine, rank, range(2, 4))
            results[origin_stage, origin_size, stage] = taken, with_buffers(engine)
            engine.close()
    return results


def test_sgd_resumes_on_every_stage_and_number_of_ranks(tmp_path: Any) -> None:
    """The state comes back bit for bit; on the same stage and ranks the rest of the run has the same bits, too."""
    straight = {
        (stage, size): ranks for size in (1, 2, 4) for stage, ranks in _by_stage(run_ranks(size, _straight)).items()
    }
    path = tmp_path / "states.pt"
    torch.save({key: exported(ranks[0][0]) for key, ranks in straight.items() if key[1] < 4}, path)
    for size in (1, 2, 4):
        for rank, results in enumerate(run_ranks(size, _resumed, str(path))):
            for (origin_stage, origin_size, stage), (taken, after) in results.items():
                half, whole = straight[origin_stage, origin_size][0]
                assert not same_bits(half, taken), (origin_stage, origin_size, stage, size, rank)
                if (origin_stage, origin_size) == (stage, size):
                    assert not same_bits(straight[stage, size][rank][1], after), (stage, size, rank)
                for name, tensor in after.items():
                    torch.testing.assert_close(tensor, whole[name], rtol=1e-4, atol=1e-6, msg=name)


def _by_stage(ranks: list[dict[int, Any]]) -> dict[int, list[Any]]:
    return {stage: [rank[stage] for rank in ranks] for stage in STAGES}


def _skipped_first(rank: int, size: int) -> dict[str, list[str]]:
    """The very first step is not finite: torch's SGD would keep a momentum that was never written."""
    differ = {}
    for stage, zero in WAYS:
        plain, troubled = build(stage, size, SGD, zero), build(stage, size, SGD, zero)
        for _ in range(troubled.accumulation):
            troubled.backward(troubled(torch.randn(MICRO, 7)).mean() * float("nan"))
        troubled.step(1e-2, torch.tensor(1.0))
        assert troubled.skipped
        troubled.sync_batch_statistics()
        for engine in (plain, troubled):
            train(engine, rank, range(2))
        differ[f"{stage} {list(zero)}"] = same_bits(with_buffers(plain), with_buffers(troubled))
    return differ


def test_a_first_step_that_is_not_finite_leaves_no_trace() -> None:
    for results in run_ranks(2, _skipped_first):
        assert not any(results.values()) and len(results) == len(WAYS), results
