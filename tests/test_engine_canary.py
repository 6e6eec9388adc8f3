"""Canaries: behaviour of DeepSpeed that `zero_state`, `engine` and `ds_config` rely on or work around.

If one fails after an upgrade, read its docstring, look at the place that it names, and change the code and the test together.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lvtrain.engine.engine import Engine, resolve_ds_config
from lvtrain.engine.optimizers.adamw import AdamWSection
from tests.ranks import run_ranks


class Two(nn.Module):
    """Two groups (decay and not), a BatchNorm, a size that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 7), nn.BatchNorm1d(7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x))


def engine(stage: int, precision: str = "bfloat16") -> Engine:
    torch.manual_seed(0)
    optimizer = AdamWSection.model_validate({"precision": precision})
    config = resolve_ds_config({"zero_optimization": {"stage": stage}}, optimizer=optimizer)
    return Engine(
        Two(), ds_config=config, micro_batch=4, accumulation=1, optimizer=optimizer, device=torch.device("cpu")
    )


def one_step(engine: Engine) -> None:
    engine.backward(engine(torch.randn(4, 3)).pow(2).sum())
    engine.step(1e-3, torch.tensor(1.0))


def _observe(rank: int, size: int) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for stage in (1, 2, 3):
        it = engine(stage)
        weights = it.module.linear.weight
        seen[f"{stage} parameters"] = (weights.dtype, it.module.norm.running_var.dtype)
        seen[f"{stage} comm"] = hasattr(weights, "comm_dtype")
        one_step(it)
        inner = it._engine.optimizer
        owners = inner.single_partition_of_fp32_groups if stage < 3 else inner.fp32_partitioned_groups_flat
        states = [it._engine.basic_optimizer.state[owner] for owner in owners]
        seen[f"{stage} states"] = [sorted(state) for state in states]
        seen[f"{stage} steps"] = (
            [float(state["step"]) for state in states],
            len({id(state["step"]) for state in states}),
        )
        if stage < 3:
            seen[f"{stage} mapping"] = all(hasattr(p, "_hp_mapping") for p in it.module.parameters())
            seen[f"{stage} relink"] = inner._hp_optimizer_states_linked
        else:
            seen["3 shapes"] = (
                tuple(weights.ds_shape),
                weights.ds_numel,
                weights.partition_numel(),
                weights.ds_tensor.numel(),
            )
            seen["3 offsets"] = inner.grad_position[inner.get_param_id(weights)][2]
        it.close()
    return seen


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    return run_ranks(2, _observe)[1]


def test_canary_autocast_keeps_weights_and_batchnorm_in_float32(seen: dict[str, Any]) -> None:
    """engine: parameters are exact in checkpoints only because torch_autocast leaves them float32; before 0.19.2 bf16 cast BatchNorm's buffers."""
    for stage in (1, 2, 3):
        assert seen[f"{stage} parameters"] == (torch.float32, torch.float32)


def test_canary_empty_safe_modules_keep_gradients_in_float32(seen: dict[str, Any]) -> None:
    """ds_config: without `lower_precision_safe_modules: []` Linear's gradients travel in bfloat16."""
    assert not any(seen[f"{stage} comm"] for stage in (1, 2, 3))


def test_canary_adam_state_hangs_on_flat_partitions_with_a_step_each(seen: dict[str, Any]) -> None:
    """zero_state: `_owners`; DeepSpeed's universal checkpoint shares one step tensor between groups, which advances twice a step."""
    for stage in (1, 2, 3):
        assert seen[f"{stage} states"] == [["exp_avg", "exp_avg_sq", "step"]] * 2
        assert seen[f"{stage} steps"] == ([1.0, 1.0], 2)


def test_canary_flat_partitions_are_mapped_to_parameters(seen: dict[str, Any]) -> None:
    """zero_state.FlatPartitions: `_hp_mapping` on every parameter, fragments linked after the first step."""
    for stage in (1, 2):
        assert seen[f"{stage} mapping"] and seen[f"{stage} relink"]


def test_canary_zero3_pads_each_parameter(seen: dict[str, Any]) -> None:
    """zero_state.ShardedParameters: 21 numbers on 2 ranks are pieces of 11, the last padded; moments are cut alike."""
    assert seen["3 shapes"] == ((7, 3), 21, 11, 11)
    assert seen["3 offsets"] == 11


def _grown_step(rank: int, size: int) -> float:
    it = engine(1, "float32")
    one_step(it)
    shared = torch.tensor(1.0)
    for owner in it._engine.optimizer.single_partition_of_fp32_groups:
        it._engine.basic_optimizer.state[owner]["step"] = shared
    try:
        it._state.check_steps()
    except RuntimeError as error:
        assert "shared between parameter groups" in str(error)
    else:
        raise AssertionError("a shared Adam step was not noticed")
    one_step(it)
    return float(shared)


def test_canary_a_shared_adam_step_advances_once_a_group() -> None:
    """engine._check refuses it because of this."""
    assert run_ranks(1, _grown_step) == [3.0]
