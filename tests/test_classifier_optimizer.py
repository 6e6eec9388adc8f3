"""The row optimizer against torch.optim: the whole matrix (dense), or only the touched rows (row_sparse)."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lvtrain.classifier.optimizer import CentreOptimizer, OptimizerSettings
from lvtrain.errors import UserError

ROWS, DIM, LR, DECAY = 103, 16, 3e-2, 0.2
TOLERANCE = {torch.float64: 1e-14, torch.float32: 3e-7}
DTYPES = [torch.float64, torch.float32]


def start(dtype: torch.dtype) -> Tensor:
    return torch.randn(ROWS, DIM, dtype=dtype, generator=torch.Generator().manual_seed(0))


def gradients(dtype: torch.dtype, steps: int = 12, share: float = 0.3) -> Iterator[tuple[Tensor, Tensor]]:
    """Sorted chosen rows and their gradient; one step touches nothing, one everything."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        threshold = {3: 0.0, 7: 1.0}.get(step, share)
        rows = (torch.rand(ROWS, generator=generator) < threshold).nonzero().squeeze(1)
        yield rows, torch.randn(len(rows), DIM, dtype=dtype, generator=generator)


def reference(name: str, parameters: list[Tensor]) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.99), eps=1e-6, weight_decay=DECAY, foreach=False)
    return torch.optim.SGD(parameters, lr=LR, momentum=0.85, weight_decay=DECAY, foreach=False)


def ours(weight: Tensor, name: Any, mode: Any, moments: Any = "float32", **options: int) -> CentreOptimizer:
    settings = OptimizerSettings(name, mode, (0.9, 0.99), 1e-6, DECAY, momentum=0.85, moments=moments)
    return CentreOptimizer(weight, settings, **options)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lvtrain.classifier.optimizer._CHUNK_ELEMENTS", {"cpu": 10 * DIM})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("dim", [DIM, 7])
def test_dense_is_torch_optim_on_the_whole_matrix(name: str, dtype: torch.dtype, full: bool, dim: int) -> None:
    weight = start(dtype)[:, :dim].contiguous()
    parameter = torch.nn.Parameter(weight.clone())
    theirs, mine = reference(name, [parameter]), ours(weight, name, "dense")
    for rows, whole_gradient in gradients(dtype):
        gradient = whole_gradient[:, :dim].contiguous()
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[rows] = gradient
        if full:
            mine.step(parameter.grad.clone(), lr=LR)
        else:
            mine.step(gradient, rows, lr=LR)
        theirs.step()
        assert (weight - parameter).abs().max() <= TOLERANCE[dtype] * 10
    assert float(mine.state()["step"]) == 12 or name == "sgd"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_row_sparse_is_torch_optim_row_by_row(name: str, dtype: torch.dtype) -> None:
    """Every row is a separate parameter, whose optimizer is called only when the row is touched."""
    weight = start(dtype)
    parameters = [torch.nn.Parameter(row.clone()) for row in weight]
    theirs, mine = reference(name, parameters), ours(weight, name, "row_sparse")
    for rows, gradient in gradients(dtype):
        for parameter in parameters:
            parameter.grad = None
        for row, g in zip(rows.tolist(), gradient):
            parameters[row].grad = g.clone()
        theirs.step()
        before = weight.clone()
        mine.step(gradient, rows, lr=LR)
        untouched = torch.ones(ROWS, dtype=torch.bool)
        untouched[rows] = False
        assert torch.equal(weight[untouched], before[untouched])
        assert (weight - torch.stack(list(parameters))).abs().max() <= TOLERANCE[dtype] * 10
    counts = torch.zeros(ROWS)
    for rows, _ in gradients(dtype):
        counts[rows] += 1
    assert torch.equal(mine.state()["row_step"].squeeze(1), counts)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_both_modes_agree_when_all_rows_are_touched(name: str) -> None:
    dense, sparse = start(torch.float64), start(torch.float64)
    optimizers = ours(dense, name, "dense"), ours(sparse, name, "row_sparse")
    for _, gradient in gradients(torch.float64, share=1.0):
        if len(gradient):
            for optimizer in optimizers:
                optimizer.step(gradient, lr=LR)
    assert (dense - sparse).abs().max() < 1e-14


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["dense", "row_sparse"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_split_chunks_and_restart_are_bitwise(name: str, mode: str, moments: str) -> None:
    whole = start(torch.float32)
    one = ours(whole, name, mode, moments=moments)
    bounds = [0, 31, 31, 60, ROWS]
    parts = [start(torch.float32)[a:b].clone() for a, b in pairwise(bounds)]
    many = [ours(part, name, mode, moments=moments, first_row=a) for part, a in zip(parts, bounds, strict=False)]
    for step, (rows, gradient) in enumerate(gradients(torch.float32)):
        one.step(gradient, rows, lr=LR)
        if step == 5:  # a restart from a copy of the state
            for i, (part, old) in enumerate(zip(parts, many)):
                many[i] = ours(part, name, mode, moments=moments, first_row=bounds[i])
                for key, value in many[i].state().items():
                    value.copy_(old.state()[key])
        for i, optimizer in enumerate(many):
            mine = (rows >= bounds[i]) & (rows < bounds[i + 1])
            optimizer.step(gradient[mine], rows[mine] - bounds[i], lr=LR)
    assert torch.equal(torch.cat(parts), whole)
    for key, value in one.state().items():
        pieces = [optimizer.state()[key] for optimizer in many]
        assert (
            all(torch.equal(piece, value) for piece in pieces)
            if value.ndim == 0
            else torch.equal(torch.cat(pieces), value)
        )


@pytest.mark.parametrize("mode", ["dense", "row_sparse"])
def test_plain_gradient_descent_keeps_no_average(mode: str) -> None:
    weight = start(torch.float64)
    before = weight.clone()
    optimizer = CentreOptimizer(weight, OptimizerSettings("sgd", mode, momentum=0.0, weight_decay=0.5))
    optimizer.step(torch.ones(2, DIM, dtype=torch.float64), torch.tensor([3, 50]), lr=0.1)
    touched = torch.tensor([3, 50])
    assert torch.allclose(weight[touched], before[touched] * 0.95 - 0.1, atol=1e-15)
    untouched = 0.95 if mode == "dense" else 1.0
    assert torch.allclose(weight[4], before[4] * untouched, atol=1e-15)
    assert set(optimizer.state()) == {"step" if mode == "dense" else "row_step"}


def test_learning_rate_and_decay_of_the_call_win() -> None:
    weight = start(torch.float64)
    before = weight.clone()
    ours(weight, "adamw", "dense").step(torch.zeros_like(weight), lr=0.5, weight_decay=0.1)
    assert torch.allclose(weight, before * 0.95, atol=1e-15)


def test_bfloat16_moments_follow_float32() -> None:
    """Stochastic rounding is unbiased: the second moment keeps moving where rounding to nearest would stand still."""
    weight = torch.zeros(200, 16)
    reduced = CentreOptimizer(weight, OptimizerSettings(moments="bfloat16", weight_decay=0.0))
    exact = CentreOptimizer(torch.zeros(200, 16), OptimizerSettings(weight_decay=0.0))
    generator = torch.Generator().manual_seed(0)
    for step in range(400):
        gradient = torch.randn(200, 16, generator=generator) * (1.0 if step < 200 else 0.1)
        reduced.step(gradient, lr=1e-3)
        exact.step(gradient, lr=1e-3)
    assert reduced.state()["exp_avg_sq"].dtype == torch.bfloat16
    ratio = reduced.state()["exp_avg_sq"].float() / exact.state()["exp_avg_sq"]
    assert abs(float(ratio.mean()) - 1) < 5e-3 and float(ratio.std()) < 0.1
    difference = (weight - exact.weight).norm() / exact.weight.norm()
    assert float(difference) < 0.02
    # rounding to nearest would not have followed the fall by 0.1% a step at all
    stuck = torch.full((1,), 1.0, dtype=torch.bfloat16)
    assert float((stuck.float() * 0.999).to(torch.bfloat16)) == 1.0


def test_memory_of_a_sparse_step_is_that_of_its_rows() -> None:
    """Counted in allocations, not in time: a sparse step of 10 rows allocates nothing of the size of the matrix."""
    weight = torch.zeros(20_000, DIM)
    optimizer = CentreOptimizer(weight, OptimizerSettings(mode="row_sparse"))
    rows = torch.arange(0, 20_000, 2000)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step(torch.ones(10, DIM), rows, lr=1e-3)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < 20 * DIM * 8
    assert (weight.abs().sum(1) > 0).sum() == 10


@pytest.mark.parametrize("name", ["name", "mode", "moments"])
def test_an_unknown_setting_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"classifier\.optimizer\.{name}: 'lion'"):
        OptimizerSettings(**{name: "lion"})  # type: ignore[arg-type]
