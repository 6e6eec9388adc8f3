"""Plain classification: what PCO's first phase alone computes, bit for bit; and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lvtrain.errors import UserError
from lvtrain.methods import StepInfo, create_method, method_title
from lvtrain.recipe import files as recipes
from lvtrain.recipe.sections import Recipe

CPU = torch.device("cpu")
CLASSES, DIM = 11, 8


def recipe(method: Any, **phase: Any) -> Recipe:
    return recipes.resolve(
        {
            "name": "test",
            "seed": 3,
            "data": {"path": "none"},
            "backbone": {"name": "vit_nano", "embedding_dim": DIM, "overrides": {"dim": 16, "depth": 1, "heads": 2}},
            "method": method,
            "phases": [{"name": "all", "global_batch": 12, "micro_batches": 2, **phase}],
            "schedule": {"total": "10 steps"},
            "optimizer": {"precision": "float32"},
        }
    )


def three_steps(method: Any, sample_rate: float) -> list[torch.Tensor]:
    """Losses, gradients of the embeddings, and the class centres after each step."""
    loaded = recipe(method, sample_rate=sample_rate)
    made: Any = create_method(loaded, num_classes=CLASSES, device=CPU)
    made.enter_phase(loaded.phases[0], first_time=True)
    generator = torch.Generator().manual_seed(1)
    found = []
    for step in range(3):
        labels = torch.randint(0, CLASSES, (12,), generator=generator)
        made.begin_step(StepInfo(step, 0.1, 0.0, 0.0), labels)
        for half in labels.chunk(2):
            x = torch.randn(6, DIM, generator=generator, requires_grad=True)
            output = made.loss(x, SimpleNamespace(labels=half), StepInfo(step, 0.1, 0.0, 0.0))
            output.loss.backward()
            found += [output.loss.detach(), x.grad, output.metrics["cos2"]]
        made.end_step(StepInfo(step, 0.1, 0.0, 0.0), None)
        found.append(made.classifier.weight.detach().clone())
    return found


@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
def test_it_is_pco_with_one_phase_bit_for_bit(sample_rate: float) -> None:
    plain, first_phase = (three_steps(name, sample_rate) for name in ("classification", "pco"))
    assert all(torch.equal(a, b) for a, b in zip(plain, first_phase, strict=True))
    assert not torch.equal(plain[-1], plain[-8])  # the class centres learn


def test_it_is_named_in_short_and_has_a_title() -> None:
    assert recipe("classification").method == recipe({"name": "classification"}).method
    assert recipe("classification").method.window == 20
    assert "classification" in method_title("classification") and method_title("not_here") == "not_here"


def test_an_expectation_needs_pco() -> None:
    assert recipe("pco", expectation="update").phases[0].model_dump()["expectation"] == "update"
    with pytest.raises(UserError, match=r"phases\.0\.expectation.* pco .*end, global_batch"):
        recipe("classification", expectation="update")


@pytest.mark.parametrize("method", ["dino", "lafs"])
def test_a_cosine_cannot_end_a_phase_without_class_centres(method: str) -> None:
    loaded = recipe(method, end={"cos2": 0.3})
    loaded.data.augmentation = method
    loaded.method.prototypes = 16
    loaded.backbone.name, loaded.backbone.overrides = "part_fvit_tiny", {"depth": 1, "freeze_landmarks": True}
    if method == "lafs":
        loaded.method.landmark_weights = "somewhere"
    with pytest.raises(UserError, match=r"phases\.all\.end\.cos2"):
        create_method(loaded, num_classes=CLASSES, device=CPU)
