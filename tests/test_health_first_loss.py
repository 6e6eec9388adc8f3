"""What the first loss must be: against simulation in plain numpy, the public logs, and the project's own classifier."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvtrain.classifier import ShardedClassifier
from lvtrain.classifier.margins import MARGINS, create_margin
from lvtrain.health.first_loss import Softmax, classes_in_step, compare, negatives
from lvtrain.recipe import files as recipes
from lvtrain.recipe.registry import METHODS

RECIPES = Path(recipes.__file__).parents[1] / "recipes"
S, D = 64.0, 512


def section(name: str, **values: Any) -> Any:
    return MARGINS.get(name).section(name=name, **values)


def softmax(margin: Any, classes: int, **values: Any) -> Softmax:
    return Softmax(margin, values.pop("identities", classes), classes, values.pop("dim", D), distinct=64, **values)


# T of each margin, written from the papers
TARGETS: dict[str, tuple[Any, Callable[[np.ndarray], np.ndarray]]] = {
    "cosface": (section("cosface", m=0.4), lambda c: S * (c - 0.4)),
    "arcface": (section("arcface", m=0.5), lambda c: S * np.cos(np.arccos(c) + 0.5)),
    "adaface": (
        section("adaface", m=0.4),
        lambda c: S * (np.cos(np.arccos(c) - 0.4 * (z := 0.333 * (D**0.5 - 20) / 100.001)) - 0.4 - 0.4 * z),
    ),
    "combined": (
        section("combined", m1=1.1, m2=0.2, m3=0.1),
        lambda c: S * (np.cos(1.1 * np.arccos(c) + 0.2) - 0.1),
    ),
}


def directions(count: int, rng: np.random.Generator, dim: int = D) -> np.ndarray:
    x = rng.standard_normal((count, dim))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def simulated(
    targets: list[Callable[[np.ndarray], np.ndarray]], classes: int, draws: int = 25, dim: int = D
) -> tuple[float, float]:
    """Mean loss and its standard error over draws of the class centres; the embeddings are kept."""
    rng = np.random.default_rng(1)
    x, losses = directions(64, rng, dim), []
    for _ in range(draws):
        cosine = x @ directions(classes, rng, dim).T
        own = np.arange(len(x)) % classes
        target = cosine[np.arange(len(x)), own]
        others = S * cosine
        others[np.arange(len(x)), own] = -np.inf
        n = np.log(np.exp(others - S).sum(axis=1)) + S
        losses.append(np.log1p(sum(np.exp(n - each(target)) for each in targets)).mean())
    return float(np.mean(losses)), float(np.std(losses) / math.sqrt(draws))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("classes", [30, 700])
def test_each_margin_has_the_loss_of_random_directions(name: str, classes: int) -> None:
    margin, target = TARGETS[name]
    mean, error = simulated([target], classes)
    assert softmax(margin, classes).first_loss().expected == pytest.approx(mean, abs=4 * error + 0.01)


def test_a_second_anchor_that_begins_at_the_centres() -> None:
    """Equal margins: log 2 more. Others: as simulated."""
    own, other = section("cosface", m=0.4), section("cosface", m=0.3)
    one = softmax(own, 700).loss()
    assert softmax(own, 700, anchors=(own,)).loss() == pytest.approx(one + math.log(2), abs=1e-3)
    mean, error = simulated([lambda c: S * (c - 0.4), lambda c: S * (c - 0.3)], 700)
    assert softmax(own, 700, anchors=(other,)).loss() == pytest.approx(mean, abs=4 * error + 0.01)


def test_the_variance_of_the_draw_is_that_of_the_simulation() -> None:
    rng = np.random.default_rng(0)
    sums = [np.log(np.exp(S * rng.standard_normal(100) / D**0.5).sum()) for _ in range(4000)]
    mean, variance = negatives(S, 100, D)
    assert mean == pytest.approx(np.mean(sums), abs=0.05) and variance == pytest.approx(np.var(sums), rel=0.1)


def test_many_classes_have_the_closed_form() -> None:
    for classes in (1_000_000, 30_000_000):
        closed = math.log(classes) + S**2 / (2 * D) - S**4 / (4 * D**3)
        assert negatives(S, classes, D)[0] == pytest.approx(closed, abs=4e-3)


LOGS = {path.stem: json.loads(path.read_text()) for path in (RECIPES / "curves").glob("*.json")}


@pytest.mark.parametrize("name", [n for n, log in LOGS.items() if log.get("first", {}).get("step") == 20])
def test_the_first_lines_of_public_logs(name: str) -> None:
    """At step 20: within 0.1% where the learning rate warms up, and up to 3% above without a warm-up."""
    log, recipe = LOGS[name], recipes.load(RECIPES / f"{name}.yaml")
    assert recipe.data.num_classes and recipe.classifier
    rate = log["differs"].get("phases.0.sample_rate", recipe.phases[0].sample_rate)
    classes, _ = classes_in_step(recipe.data.num_classes, rate, recipe.phases[0].global_batch)
    expected = softmax(recipe.classifier.margin, classes).loss()
    warm = recipe.schedule.warmup.amount or "schedule.warmup" in log["differs"]
    ratio = log["first"]["loss"] / expected
    assert abs(ratio - 1) < 1e-3 if warm else -1e-3 < ratio - 1 < 0.03


def test_the_number_of_classes_in_a_step() -> None:
    assert classes_in_step(2_059_906, 0.2, 24_576)[0] == 411_981
    assert classes_in_step(500, 1.0, 128)[0] == 500
    rng = np.random.default_rng(0)
    distinct = np.mean([len(np.unique(rng.integers(0, 500, 128))) for _ in range(500)])
    sampled, found = classes_in_step(500, 0.1, 128)
    assert sampled == found == pytest.approx(distinct, abs=1)


# -------------------------------------------------------------------------------------------------- the project's classifier


def first_loss(name: str, embeddings: str, seed: int, **wrong: Any) -> tuple[Any, float]:
    """A recipe's expected first loss for 500 identities, and the loss of its classifier on embeddings of a kind, with faulty values."""
    recipe = recipes.load(RECIPES / f"{name}.yaml")
    assert recipe.classifier is not None
    wanted = METHODS.get(recipe.method.name).first_loss(recipe, num_classes=500)
    phase, dim = recipe.phases[0], recipe.backbone.embedding_dim
    values = recipe.classifier.margin.model_dump() | {k: v for k, v in wrong.items() if k in ("scale", "m")}
    margin = create_margin(MARGINS.get(values["name"]).section(**values))
    if recipe.classifier.margin.warmup.amount:
        margin.warmup_factor = 0.0
    rate = wrong.get("sample_rate", phase.sample_rate)
    head = ShardedClassifier(wrong.get("num_classes", 500), dim, margin=margin, sample_rate=rate, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(phase.global_batch, dim, generator=generator)
    x = {"random": x, "alike": x[:1] + 0.05 * x, "few": x[:4].repeat_interleave(phase.global_batch // 4, 0)}[embeddings]
    labels = torch.randint(0, 500, (len(x),), generator=generator)
    head.begin_step(0, labels, warmup_factor=margin.warmup_factor)
    return wanted, float(head(x, labels, step=0).loss)


QUICK = ["quickstart", "pco_ablation", "cluster_quickstart", "finetune_quickstart", "part_fvit_quickstart"]


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("embeddings", ["random", "alike", "few"])
def test_no_alarm_on_quick_recipes_whatever_the_embeddings(name: str, embeddings: str) -> None:
    for seed in range(2):
        wanted, found = first_loss(name, embeddings, seed)
        assert compare(wanted, found).agrees


@pytest.mark.parametrize(
    ("wrong", "cause", "value"),
    [
        ({"m": 0.0}, "no_margin", None),
        ({"m": 0.0}, "margin", 0.0),
        ({"scale": 30.0}, "scale", 30.0),
        ({"scale": 128.0}, "scale", 128.0),
        ({"num_classes": 20_000, "sample_rate": 1.0}, "classes", 20_000.0),
    ],
)
def test_a_deviation_names_what_is_wrong(wrong: dict[str, Any], cause: str, value: float | None) -> None:
    wanted, found = first_loss("quickstart", "random", 0, **wrong)
    compared = compare(wanted, found)
    causes = {each.kind: each.value for each in compared.causes}
    assert not compared.agrees and compared.fields()["causes"].keys() == causes.keys() and cause in causes
    if value is not None:
        assert causes[cause] == pytest.approx(value, rel=1.0 if cause == "classes" else 0.06, abs=0.03)


def test_logits_that_are_not_cosines_and_batches_without_labels() -> None:
    wanted = softmax(section("cosface"), 100_000).first_loss()
    assert [each.kind for each in compare(wanted, 900.0).causes] == ["not_unit"]
    assert [each.kind for each in compare(wanted, 0.0).causes] == ["no_labels"]
    assert "all_zero" in [each.kind for each in compare(wanted, S * 0.4 + math.log(100_000)).causes]
    half = softmax(section("cosface", m=0.5), 100_000).changed(distinct=4096).first_loss()
    assert "kind_of_margin" in [each.kind for each in compare(half, half.expected - S * (0.5 - math.sin(0.5))).causes]


@pytest.mark.parametrize(
    "name", ["cluster_quickstart", "dino_fvitb_webface1shot", "distill_quickstart", "pco_vitl_webface42m"]
)
def test_methods_that_know_their_first_loss(name: str) -> None:
    recipe = recipes.load(RECIPES / f"{name}.yaml")
    wanted = METHODS.get(recipe.method.name).first_loss(recipe, num_classes=recipe.data.num_classes or 500)
    assert 0 < wanted.bound < wanted.expected


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("quickstart", ["init_from.path=runs/x", "init_from.classifier=means"]),
        ("finetune_quickstart", ["method.landmarks=anchored"]),
        ("cluster_quickstart", ["method.warmup=0 epochs"]),
        ("quickstart", ["classifier.margin.filter_threshold=0.3"]),
        ("distill_quickstart", ["init_from.path=runs/x"]),
        ("dino_quickstart", []),
    ],
)
def test_a_first_loss_that_is_not_known_says_why(name: str, overrides: list[str]) -> None:
    recipe = recipes.load(RECIPES / f"{name}.yaml", overrides)
    assert isinstance(METHODS.get(recipe.method.name).first_loss(recipe, num_classes=500), str)


def test_the_first_loss_of_dino() -> None:
    """Two heads of the same weights on views of cosine rho: within the range for every rho."""
    recipe = recipes.load(RECIPES / "dino_fvitb_webface1shot.yaml", ["method.prototypes=4096"])
    wanted = METHODS.get("dino").first_loss(recipe, num_classes=1)
    rng = np.random.default_rng(0)
    prototypes = directions(4096, rng, 256)
    for rho in (0.0, 0.5, 1.0):
        a, b = directions(32, rng, 256), directions(32, rng, 256)
        b = rho * a + math.sqrt(1 - rho**2) * (b - (a * b).sum(1, keepdims=True) * a)
        b /= np.linalg.norm(b, axis=1, keepdims=True)
        teacher, student = a @ prototypes.T / 0.04, b @ prototypes.T / 0.1
        p = np.exp(teacher) / np.exp(teacher).sum(1, keepdims=True)
        loss = -(p * (student - np.log(np.exp(student).sum(1, keepdims=True)))).sum(1).mean()
        assert abs(loss - wanted.expected) < wanted.bound
