"""The losses on the page of symptoms are those that the classifier gives in such a state."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from lvtrain.classifier import ShardedClassifier
from lvtrain.classifier.margins import ArcFace, CosFace, Margin

PAGE = Path(__file__).parents[1] / "lvtrain" / "training" / "troubleshooting.md"
CURVES = PAGE.parents[1] / "recipes" / "curves"
S, CLASSES, DIM = 64.0, 2000, 512
LN = math.log(CLASSES)


def rows(first: str) -> list[list[str]]:
    """The cells of the page's table whose first column is `first`."""
    lines = PAGE.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first}"))
    table = [line for line in lines[start + 2 : start + 30]]
    end = next(i for i, line in enumerate(table) if not line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[:end]]


def loss(margin: Margin, embeddings: torch.Tensor, centres: torch.Tensor | None = None, factor: float = 1.0) -> float:
    classifier = ShardedClassifier(CLASSES, DIM, margin=margin)
    if centres is not None:
        classifier.weight.data.copy_(centres)
    labels = torch.arange(len(embeddings)) % CLASSES
    classifier.begin_step(0, labels, warmup_factor=factor)
    return float(classifier(embeddings, labels, step=0).loss)


def random(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("margin", "part", "collapsed"),
    [(CosFace(m=0.4), 0.4, 0.4), (ArcFace(m=0.5), math.sin(0.5), 1 - math.cos(0.5))],
    ids=["cosface", "arcface"],
)
def test_the_formulas_are_those_of_the_classifier(margin: Margin, part: float, collapsed: float) -> None:
    one = random(1)
    # step 1: of 2,000 random classes and 256 images, to within a few times the deviation of the mean target logit
    assert loss(margin, random(256)) == pytest.approx(S * part + LN + S**2 / (2 * DIM), abs=0.5)
    # one direction at right angles to all centres: they have no part along it
    centres = random(CLASSES, seed=2)
    centres -= (centres @ one.T) / one.square().sum() * one
    assert loss(margin, one.expand(64, -1), centres) == pytest.approx(S * part + LN, abs=1e-3)
    # centres, too
    assert loss(margin, one.expand(64, -1), one.expand(CLASSES, -1)) == pytest.approx(S * collapsed + LN, abs=2e-3)
    # no margin, equal cosines
    assert loss(margin, one.expand(64, -1), centres, factor=0.0) == pytest.approx(LN, abs=1e-3)


def test_the_figures_follow_from_the_formulas() -> None:
    found = rows("identities and sample rate")
    assert len(found) == 8
    for identities, margin, *figures in found:
        classes, _, rate = identities.partition(", ")[2].partition(" × ")
        effective = math.log(int(classes.replace(",", "")) * float(rate or 1))
        name, m = margin.split()[0], float(margin.split()[1])
        spread = S * (math.sin(m) if name == "ArcFace" else m) + effective
        collapsed = S * (1 - math.cos(m)) + effective if name == "ArcFace" else spread
        expected = [effective, spread + S**2 / (2 * DIM), spread, collapsed]
        assert [float(figure) for figure in figures] == pytest.approx(expected, abs=0.006), identities


def test_the_numbers_in_the_text() -> None:
    text = PAGE.read_text()
    assert f"{-math.log(1e-30):.2f}" == "69.08" and "stays at 69.08" in text
    # ArcFace 0.5 on MS1MV3 where every cosine is 0.915
    cosine = 0.915
    at = S * (cosine - math.cos(math.acos(cosine) + 0.5)) + math.log(93_431)
    assert at == pytest.approx(31, abs=0.05) and "cosine is 0.915" in text
    for rate, first in ((0.2, 42.53), (0.3, 42.93)):
        assert 0.4 * S + math.log(rate * 2_059_906) + S**2 / (2 * DIM) == pytest.approx(first, abs=0.006)
    assert "begin at 42.49" in text and "would be 42.93" in text
    assert math.log(10) == pytest.approx(2.3, abs=0.01) and "lowers every loss by 2.3" in text


def test_the_plateau_of_the_published_logs() -> None:
    for network, below_30, below_10, below_5, epochs in rows("network"):
        curve = json.loads((CURVES / f"cosface_vit{network[-1].lower()}_webface42m.json").read_text())
        steps = [curve["step_below_loss"][key] for key in ("30", "10", "5")]
        assert [f"{step:,}" for step in steps] == [below_30, below_10, below_5]
        means = [curve["loss_by_epoch"][epoch] for epoch in (0, 1, 2, 39)]
        assert [float(mean) for mean in re.split(", ", epochs)] == pytest.approx(means, abs=0.006)
