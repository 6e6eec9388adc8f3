"""The training loop of `lvtrain/classifier/example_ddp.py` on two ranks against one process with materialised logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import lvtrain
from lvtrain.classifier import OptimizerSettings, example_ddp
from tests.ranks import run_ranks

CLASSES, DIM, GLOBAL, STEPS, LR = 37, 8, 12, 4, 0.5
SCALE, M = 16.0, 0.35


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(48, 24), torch.nn.Tanh(), torch.nn.Linear(24, DIM)
    ).double()


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    draws = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(GLOBAL, 3, 4, 4, generator=draws, dtype=torch.float64),
            torch.randint(CLASSES, (GLOBAL,), generator=draws),
        )
        for _ in range(STEPS)
    ]


def on_a_rank(rank: int, ranks: int) -> dict[str, Any]:
    share = slice(rank * GLOBAL // ranks, (rank + 1) * GLOBAL // ranks)
    backbone = network()
    classifier = lvtrain.ShardedClassifier(
        CLASSES,
        DIM,
        margin=lvtrain.CosFace(scale=SCALE, m=M),
        optimizer=OptimizerSettings(name="sgd", momentum=0.9, weight_decay=0.0),
        dtype=torch.float64,
    )
    first = classifier.weight.detach().clone()
    losses = example_ddp.train(backbone, classifier, [(x[share], y[share]) for x, y in data()], lr=LR)
    gradients = [parameter.grad for parameter in backbone.parameters()]
    centres = classifier.weight.detach().clone()
    return {
        "losses": losses,
        "gradients": gradients,
        "state": backbone.state_dict(),
        "first": first,
        "centres": centres,
        "main": example_ddp.main(),
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(2, on_a_rank)


def test_two_ranks_train_as_one_process_with_all_logits(ranks: list[dict[str, Any]]) -> None:
    centres = torch.nn.Parameter(torch.cat([each["first"] for each in ranks]))
    backbone = network()
    optimizer = torch.optim.SGD([*backbone.parameters(), centres], lr=LR, momentum=0.9)
    losses = []
    for images, labels in data():
        cosines = F.normalize(backbone(images)) @ F.normalize(centres).T
        loss = F.cross_entropy(SCALE * (cosines - M * F.one_hot(labels, CLASSES).double()), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] != pytest.approx(losses[-1], rel=0.05)
    for each in ranks:
        assert each["losses"] == pytest.approx(losses, rel=1e-9)
        for got, expected in zip(each["gradients"], backbone.parameters()):
            torch.testing.assert_close(got, expected.grad, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(each["state"], backbone.state_dict(), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(torch.cat([each["centres"] for each in ranks]), centres.data, rtol=1e-8, atol=1e-12)


def test_the_file_itself_runs_on_two_ranks(ranks: list[dict[str, Any]]) -> None:
    first, second = (each["main"] for each in ranks)
    assert first == second and len(first) == 10 and first[-1] < first[0]
