"""PCO's feature expectations: what a phase does with them, and their state. Their loss is tested with the classifier's."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lvtrain.classifier.margins import CosFace
from lvtrain.methods import StepInfo, create_method
from lvtrain.recipe import files as recipes
from tests.ranks import run_ranks

CLASSES, DIM, BATCH = 37, 16, 16
PHASES = [
    {"name": "alignment", "sample_rate": 0.4},
    {"name": "stabilisation", "sample_rate": 0.4, "expectation": "update"},
    {"name": "refinement", "expectation": "frozen"},
]


def pco(**settings: Any) -> Any:
    recipe = recipes.resolve(
        {
            "name": "x",
            "data": {"path": "none"},
            "backbone": {"name": "vit_nano", "embedding_dim": DIM},
            "classifier": {"margin": {"name": "arcface", "scale": 32}},
            "method": {"name": "pco", **settings},
            "phases": [{"global_batch": BATCH, "micro_batches": 4, **phase} for phase in PHASES],
            "schedule": {"total": "30 steps"},
        }
    )
    return create_method(recipe, num_classes=CLASSES, device=torch.device("cpu"))


def enter(method: Any, name: str, *, first_time: bool = True) -> None:
    phase = next(phase for phase in method.recipe.phases if phase.name == name)
    method.enter_phase(phase, first_time=first_time)


def step(method: Any, number: int, rank: int = 0, ranks: int = 1) -> float:
    generator = torch.Generator().manual_seed(number)
    x, labels = (
        torch.randn(BATCH, DIM, generator=generator),
        torch.randint(0, CLASSES, (BATCH,), generator=generator),
    )
    labels[5] = -1
    now = StepInfo(step=number, lr=0.05, progress=0.1, epoch=0.0)
    method.begin_step(now, labels)
    mine = range(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    for micro in mine:
        span = slice(4 * micro, 4 * micro + 4)
        batch = SimpleNamespace(labels=labels[span])
        loss = method.loss(x[span].clone().requires_grad_(), batch, now).loss
        (loss / len(mine)).backward()
    method.end_step(now, nullcontext)
    return float(loss)


@pytest.mark.parametrize("init", ["weight", "first_feature"])
def test_a_phase_decides_what_happens_to_the_expectations(init: str) -> None:
    method = pco(expectation_init=init)
    enter(method, "alignment")
    step(method, 0)
    assert method.anchors() == []
    weight = method.classifier.weight.detach().clone()
    enter(method, "stabilisation")
    begun = method.expectations.rows_tensor.clone()
    if init == "weight":
        torch.testing.assert_close(begun, torch.nn.functional.normalize(weight))
    assert bool(method.expectations.valid.all()) == (init == "weight")
    step(method, 1)
    moved = method.expectations.rows_tensor.clone()
    changed = (moved != begun).any(dim=1)
    seen = torch.randint(0, CLASSES, (BATCH,), generator=_after_images(1))
    seen[5] = -1
    assert set(changed.nonzero().squeeze(1).tolist()) == set(seen[seen >= 0].tolist())
    enter(method, "refinement")
    step(method, 2)
    assert torch.equal(method.expectations.rows_tensor, moved)
    enter(method, "alignment")
    assert method.anchors() == [] and "classifier.expectation" not in method.state()


def _after_images(number: int) -> torch.Generator:
    generator = torch.Generator().manual_seed(number)
    torch.randn(BATCH, DIM, generator=generator)
    return generator


def test_the_second_anchor_is_what_the_recipe_says() -> None:
    method = pco(m2=0.25, expectation_negatives="shared", expectation_init="first_feature")
    enter(method, "stabilisation")
    (anchor,) = method.anchors()
    assert isinstance(anchor.margin, CosFace) and (anchor.margin.scale, anchor.margin.settings.m) == (32.0, 0.25)
    assert not anchor.own_negatives and anchor.is_unit and anchor.valid is method.expectations.valid
    method = pco()
    enter(method, "stabilisation")
    assert method.anchors()[0].own_negatives and method.anchors()[0].valid is None


def test_a_discarded_step_moves_nothing() -> None:
    method = pco()
    enter(method, "stabilisation")
    before = method.expectations.rows_tensor.clone()
    now = StepInfo(step=0, lr=0.05, progress=0.1, epoch=0.0)
    method.begin_step(now, torch.tensor([1, 2]))
    method.loss(torch.randn(2, DIM).requires_grad_(), SimpleNamespace(labels=torch.tensor([1, 2])), now)
    method.discard_step()
    labels = torch.full((4,), 3)
    method.begin_step(now, labels)
    method.loss(torch.randn(4, DIM).requires_grad_(), SimpleNamespace(labels=labels), now).loss.backward()
    method.end_step(now, nullcontext)
    changed = (method.expectations.rows_tensor != before).any(dim=1)
    assert changed.nonzero().squeeze(1).tolist() == [3]


class Reader:
    def __init__(self, states: list[dict[str, Any]]) -> None:
        self.states = states

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return torch.cat([state[name].tensor for state in self.states])[start:stop]

    def replicated(self, name: str) -> torch.Tensor:
        return self.states[0][name].tensor


def half_way(rank: int, ranks: int, given: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Two steps of phase 2, or (given their state) a third one."""
    method = pco()
    enter(method, "stabilisation", first_time=given is None)
    if given is not None:
        method.load_state(Reader(given))
    for number in range(2) if given is None else [2]:
        step(method, number, rank, ranks)
    state: dict[str, Any] = method.state()
    return state


@functools.cache
def written_on_two_ranks() -> list[dict[str, Any]]:
    return run_ranks(2, half_way, None)


def test_state_has_its_names_and_goes_on_on_any_number_of_ranks() -> None:
    states = written_on_two_ranks()
    assert {"classifier.weight", "classifier.expectation", "classifier.expectation_valid"} <= set(states[0])
    assert [
        (state["classifier.expectation"].start, len(state["classifier.expectation"].tensor)) for state in states
    ] == [
        (0, 18),
        (18, 19),
    ]
    one = half_way(0, 1, states)
    four = run_ranks(4, half_way, states)
    for name in ("classifier.weight", "classifier.expectation"):
        torch.testing.assert_close(
            torch.cat([state[name].tensor for state in four]), one[name].tensor, rtol=0, atol=1e-6
        )
