"""The cluster method against its formulas written out in float64 on one process with all logits, on 1, 2 and 4 ranks."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lvtrain.checkpoint.state import Replicated, Rows, State
from lvtrain.errors import UserError
from lvtrain.methods import StepInfo, create_method
from lvtrain.methods.cluster import ClusterMethod
from lvtrain.recipe import files as recipes
from lvtrain.recipe.sections import Recipe
from tests.ranks import run_ranks

CLASSES, DIM, VIRTUAL, MICRO = 53, 12, 4, 5
GLOBAL = VIRTUAL * MICRO
SCALE = 24.0

SETTINGS: dict[str, dict[str, Any]] = {
    "baseline": {"guided": False, "alpha": 0.0, "beta": 0.0},
    "1": {"guided": True, "alpha": 0.0, "beta": 0.0},
    "2": {"guided": False, "alpha": 0.7, "beta": 0.0},
    "3": {"guided": False, "alpha": 0.0, "beta": 0.6},
    "4": {"guided": True, "alpha": 0.7, "beta": 0.0},
    "5": {"guided": True, "alpha": 0.0, "beta": 0.6},
    "6": {"guided": True, "alpha": 0.7, "beta": 0.6},
}
VARIANTS: dict[str, dict[str, Any]] = {
    **SETTINGS,
    "sampled": {**SETTINGS["6"], "sample_rate": 0.4},
    "rescaled": {**SETTINGS["2"], "mean_temperature": 0.1, "min_temperature": 0.09},
    "learnable": {**SETTINGS["2"], "temperature": "learnable", "tau0": 0.15, "sample_rate": 0.4},
    "centre": {**SETTINGS["4"], "clustering": "centre"},
}


def make_recipe(**settings: Any) -> Recipe:
    settings = dict(settings)
    rate = settings.pop("sample_rate", 1.0)
    margin = settings.pop("margin", {"name": "arcface", "scale": SCALE})
    rows = {"name": "sgd", "weight_decay": 0.0}
    method = {"name": "cluster", "warmup": "0 steps", **settings}
    phase = {"name": "all", "global_batch": GLOBAL, "micro_batches": VIRTUAL, "sample_rate": rate}
    return recipes.resolve(
        {
            "name": "test",
            "seed": 3,
            "data": {"path": "none"},
            "backbone": {"name": "vit_nano", "embedding_dim": DIM},
            "classifier": {"margin": margin, "optimizer": rows},
            "method": method,
            "phases": [phase],
            "schedule": {"total": "10 steps"},
        }
    )


def make_method(**settings: Any) -> ClusterMethod:
    recipe = make_recipe(**settings)
    method = create_method(recipe, num_classes=CLASSES, device=torch.device("cpu"))
    assert isinstance(method, ClusterMethod)
    method.enter_phase(recipe.phases[0], first_time=True)
    return method


def step_data(step: int) -> tuple[Tensor, Tensor]:
    """Embeddings [G, d] float64 and labels [G]: repeated classes, an ignored sample, classes only seen in some steps."""
    generator = torch.Generator().manual_seed(100 + step)
    labels = torch.randint(0, CLASSES, (GLOBAL,), generator=generator)
    labels[3] = labels[9]
    labels[(step * 7) % GLOBAL] = -1
    spread = 0.3 + 0.5 * torch.rand(CLASSES, 1, generator=torch.Generator().manual_seed(1))
    means = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(2))
    noise = torch.randn(GLOBAL, DIM, generator=generator)
    return (5 * (means[labels] + spread[labels] * noise)).double(), labels


def fill_bank(method: ClusterMethod, steps: int = 7) -> None:
    for step in range(steps):
        method.bank.update(*step_data(step))


# --------------------------------------------------------------------------------------------------------------- reference


def reference(
    weight: Tensor, x: Tensor, labels: Tensor, bank: Any, chosen: Tensor, s: Any, tau: Tensor | None
) -> Tensor:
    """L of the paper over one batch, all logits at once; bank: centres [C, d], phi [C], measured [C], valid [C]."""
    xh, wh, c = F.normalize(x), F.normalize(weight), bank.centres
    keep = labels >= 0
    y = labels.clamp_min(0)
    sampled = torch.zeros(CLASSES, dtype=torch.bool)
    sampled[chosen] = True
    known_phi = bank.phi[sampled & bank.measured]
    phi = torch.where(bank.measured, bank.phi, known_phi.mean())

    margin = torch.full((len(x),), 0.5, dtype=x.dtype)
    if s.guided:
        margin = s.m_low + (s.m_high - s.m_low) * (phi[y] - known_phi.min()) / (known_phi.max() - known_phi.min())
    cosine = xh @ wh.T
    own = cosine[torch.arange(len(x)), y]
    theta = torch.arccos(own)
    bent = torch.where(theta + margin <= math.pi, torch.cos(theta + margin), own - margin * torch.sin(margin))
    onehot = F.one_hot(y, CLASSES).bool()
    logits = torch.where(onehot, bent.unsqueeze(1), cosine) * SCALE
    each = F.cross_entropy(logits.masked_fill(~sampled, -math.inf), y, reduction="none")

    has_centre = bank.valid[y]
    if s.alpha > 0 and s.clustering == "contrastive":
        temperature = (phi * (1.0 if s.mean_temperature is None else s.mean_temperature / known_phi.mean())).clamp_min(
            s.min_temperature
        )
        logits = xh @ c.T / (temperature if tau is None else tau)
        out = ~(sampled & bank.valid) & ~onehot
        con = F.cross_entropy(logits.masked_fill(out, -math.inf), y, reduction="none")
        each = each + s.alpha * torch.where(has_centre, con, 0.0)
    if s.alpha > 0 and s.clustering == "centre":
        each = each + s.alpha * torch.where(has_centre, 0.5 * (xh - c[y]).square().sum(1), 0.0)
    if s.beta > 0:
        each = each + s.beta * torch.where(has_centre, 1 - (wh[y] * c[y]).sum(1), 0.0)
    return torch.where(keep, each, 0.0).sum() / len(x)


def one_step(rank: int, ranks: int, settings: dict[str, Any]) -> dict[str, Tensor]:
    """The loss and gradients of one global batch as the engine would make them, on this rank."""
    method = make_method(**settings)
    fill_bank(method)
    method.classifier.double()
    x, labels = step_data(50)
    labels[5] = CLASSES - 1  # a class the bank may not know
    method.begin_step(StepInfo(0, 0.1, 0.0, 0.0), labels)
    accumulation = VIRTUAL // ranks
    if method.learnable:
        method.module.double()
    parts, losses, extra = [], [], {}
    for micro in range(accumulation):
        v = rank * accumulation + micro
        span = slice(v * MICRO, (v + 1) * MICRO)
        leaf = x[span].clone().requires_grad_()
        outputs = (leaf, torch.exp(-method.module.log_temperature)) if method.learnable else leaf
        output = method.loss(outputs, SimpleNamespace(labels=labels[span]), StepInfo(0, 0.1, 0.0, 0.0))
        (output.loss / accumulation).backward()
        parts.append(leaf.grad)
        losses.append(output.loss.detach())
        extra = {name: value.double().reshape(()) for name, value in output.metrics.items()}
    gradient = torch.zeros_like(method.classifier.weight)
    chosen = method.classifier.chosen
    gradient[slice(None) if chosen is None else chosen] = method.classifier._step.gradient
    result = {"loss": torch.stack(losses).mean(), "x": torch.cat(parts), "weight": gradient, "extra": extra}
    if method.learnable:
        result["tau"] = method.module.log_temperature.grad
    local = torch.arange(len(gradient)) if chosen is None else chosen
    result["chosen"] = local + method.classifier.rows[0]
    result["initial"] = method.classifier.weight.detach()
    result["bank"] = {
        "centres": method.bank.rows_tensor.double(),
        "phi": method.bank.concentration(),
        "measured": method.bank.measured,
        "valid": method.bank.valid,
    }
    return result


def expected(results: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Tensor]:
    x, labels = step_data(50)
    labels[5] = CLASSES - 1
    x.requires_grad_()
    weight = torch.cat([r["initial"] for r in results]).requires_grad_()
    bank = SimpleNamespace(**{key: torch.cat([r["bank"][key] for r in results]) for key in results[0]["bank"]})
    s = make_recipe(**settings).method
    log_tau = torch.tensor([math.log(s.tau0)], dtype=torch.float32).double().requires_grad_()
    chosen = torch.cat([r["chosen"] for r in results])
    loss = reference(weight, x, labels, bank, chosen, s, log_tau.exp() if s.temperature == "learnable" else None)
    loss.backward()
    return {"loss": loss.detach(), "x": x.grad, "weight": weight.grad, "tau": log_tau.grad}


def check(results: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    ranks = len(results)
    truth = expected(results, settings)
    assert truth["weight"].abs().max() > 0
    for result in results:
        assert float(result["loss"]) == pytest.approx(
            float(truth["loss"]), rel=1e-6
        )  # tau and phi pass through float32
    # the engine averages over ranks, so a rank's embedding gradient is ranks times the loss's
    gradient = torch.cat([r["x"] for r in results]) / ranks
    assert torch.allclose(gradient, truth["x"], atol=1e-9, rtol=2e-6)
    assert torch.allclose(torch.cat([r["weight"] for r in results]), truth["weight"], atol=1e-9, rtol=2e-6)
    if truth["tau"] is not None:
        assert torch.allclose(torch.stack([r["tau"] for r in results]).mean(0).double(), truth["tau"], rtol=2e-6)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_loss_and_gradients_on_one_rank(variant: str) -> None:
    check([one_step(0, 1, VARIANTS[variant])], VARIANTS[variant])


@pytest.mark.parametrize("ranks", [2, 4])
def test_loss_and_gradients_on_several_ranks(ranks: int, on_ranks: dict[int, list[dict[str, Any]]]) -> None:
    results = [result["variants"] for result in on_ranks[ranks]]
    for name, settings in VARIANTS.items():
        check([result[name] for result in results], settings)
        assert len({float(result[name]["extra"]["phi_mean"]) for result in results}) == 1


# ------------------------------------------------------------------------------------------------------------------ limits


def classification_only(method: Any, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    leaf = x.float().requires_grad_()
    method.begin_step(StepInfo(0, 0.1, 0.0, 0.0), labels)
    output = method.loss(leaf, SimpleNamespace(labels=labels), StepInfo(0, 0.1, 0.0, 0.0))
    output.loss.backward()
    return output.loss.detach(), leaf.grad, method.classifier._step.gradient


@pytest.mark.parametrize("limit", ["constant lambda", "weights of zero", "warm-up"])
def test_limits_are_plain_arcface_bit_for_bit(limit: str) -> None:
    settings: dict[str, Any] = {
        "constant lambda": {"guided": True, "m_low": 0.5, "m_high": 0.5, "alpha": 0.0, "beta": 0.0},
        "weights of zero": {"guided": False, "alpha": 0.0, "beta": 0.0},
        "warm-up": {"warmup": "3 epochs"},
    }[limit]
    method = make_method(**settings)
    fill_bank(method)
    plain_recipe = recipes.resolve(make_recipe().model_dump(mode="json") | {"method": "classification"})
    plain = create_method(plain_recipe, num_classes=CLASSES, device=torch.device("cpu"))
    plain.enter_phase(plain_recipe.phases[0], first_time=True)
    x, labels = step_data(50)
    ours, theirs = classification_only(method, x, labels), classification_only(plain, x, labels)
    for mine, other in zip(ours, theirs):
        assert torch.equal(mine, other)


def test_warmup_ends_after_its_length() -> None:
    x, labels = step_data(50)
    for length, before, after in (
        ("4 steps", StepInfo(3, 0.1, 0, 9.0), StepInfo(4, 0.1, 0, 0.0)),
        ("1.5 epochs", StepInfo(99, 0.1, 0, 1.4), StepInfo(0, 0.1, 0, 1.5)),
    ):
        method = make_method(warmup=length)
        for now, warm in ((before, False), (after, True)):
            method.begin_step(now, labels)
            output = method.loss(x.float(), SimpleNamespace(labels=labels), now)
            assert ("loss_clustering" in output.metrics) == warm
            assert ("loss_aligning" in output.metrics) == warm


def test_margins_grow_with_the_concentration() -> None:
    method = make_method(m_low=0.3, m_high=0.7)
    fill_bank(method)
    labels = torch.arange(CLASSES)
    method.begin_step(StepInfo(0, 0.1, 0.0, 0.0), labels)
    measured = method.bank.measured
    phi, margins = method.bank.concentration()[measured], method.margins[measured]
    assert torch.equal(phi.argsort(), margins.argsort())
    assert float(margins.min()) == pytest.approx(0.3) and float(margins.max()) == pytest.approx(0.7)
    # a class never measured stands at the mean
    assert not measured.all()
    share = (phi.mean() - phi.min()) / (phi.max() - phi.min())
    assert torch.allclose(method.margins[~measured], 0.3 + 0.4 * share)


def test_an_empty_bank_and_a_batch_without_labels_are_finite() -> None:
    method = make_method()
    for labels in (step_data(50)[1], torch.full((GLOBAL,), -1)):
        loss, gradient, rows = classification_only(method, step_data(50)[0], labels)
        assert torch.isfinite(loss) and torch.isfinite(gradient).all() and torch.isfinite(rows).all()
        method.end_step(StepInfo(0, 0.1, 0.0, 0.0), full_parameters=None)
    assert method.bank.valid.any()


def test_a_discarded_step_leaves_no_trace() -> None:
    method = make_method()
    fill_bank(method)
    before = {name: saved.tensor.clone() for name, saved in method.state().items()}
    classification_only(method, *step_data(50))
    method.discard_step()
    assert all(torch.equal(saved.tensor, before[name]) for name, saved in method.state().items())
    assert method.seen == []


def test_learnable_temperature_is_part_of_what_is_trained() -> None:
    method = make_method(temperature="learnable", tau0=0.2)
    names = [name for name, _ in method.module.named_parameters()]
    assert "log_temperature" in names and any(name.startswith("backbone.") for name in names)
    images = torch.zeros(2, 3, 112, 112)
    method.module.eval()
    embeddings, inverse = method.module(images)
    assert float(inverse) == pytest.approx(5.0) and embeddings.shape == (2, DIM)
    assert torch.equal(method.evaluated()(images), embeddings)


def test_triplet_is_the_librarys() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    method = make_method(clustering="triplet", alpha=1.0, beta=0.0, guided=False, triplet_margin=0.3)
    x, labels = step_data(50)
    labels = labels.clone()
    labels[:10] = torch.arange(10) % 4
    leaf = x.float().requires_grad_()
    method.begin_step(StepInfo(0, 0.1, 0.0, 0.0), labels)
    output = method.loss(leaf, SimpleNamespace(labels=labels), StepInfo(0, 0.1, 0.0, 0.0))
    # batch-hard by hand: for every anchor the farthest positive and the nearest negative
    keep = labels >= 0
    unit, y = F.normalize(x.float())[keep], labels[keep]
    distance = distances.LpDistance()(unit)
    same = y[:, None] == y[None, :]
    triplets = []
    for i in range(len(y)):
        positives = [j for j in range(len(y)) if same[i, j] and j != i]
        if positives:
            p = max(positives, key=lambda j: float(distance[i, j]))
            n = min((j for j in range(len(y)) if not same[i, j]), key=lambda j: float(distance[i, j]))
            triplets.append((i, p, n))
    by_hand = losses.TripletMarginLoss(margin=0.3)(unit, y, tuple(torch.tensor(column) for column in zip(*triplets)))
    assert float(output.metrics["loss_clustering"]) == pytest.approx(float(by_hand), rel=1e-5)
    assert float(output.loss) == pytest.approx(float(output.metrics["loss_classification"] + by_hand), rel=1e-5)


def test_user_mistakes() -> None:
    with pytest.raises(UserError, match=r"margin\.name: arcface"):
        make_method(margin={"name": "cosface"})
    with pytest.raises(UserError, match="m_high"):
        make_recipe(m_low=0.6, m_high=0.5)
    with pytest.raises(UserError, match="steps or epochs"):
        make_recipe(warmup="100 samples")
    values = make_recipe().model_dump(mode="json") | {"classifier": None}
    with pytest.raises(UserError, match="classifier"):
        create_method(recipes.resolve(values), num_classes=CLASSES, device=torch.device("cpu"))


# ------------------------------------------------------------------------------------------- several steps, ranks, restarts


class Saved:
    """What a checkpoint reader offers, from whole tensors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name][start:stop]

    def replicated(self, name: str) -> Tensor:
        return self.tensors[name]


def train_steps(
    rank: int, ranks: int, first: int, last: int, saved: dict[str, Tensor] | None, projection: Tensor
) -> dict[str, Any]:
    """Steps [first, last) of a linear backbone trained by plain gradient descent, as the engine would average it."""
    method = make_method(warmup="2 steps", sample_rate=0.5)
    if saved is not None:
        method.load_state(Saved(saved))
    projection = projection.clone().requires_grad_()
    accumulation = VIRTUAL // ranks
    losses = []
    for step in range(first, last):
        x, labels = step_data(step)
        now = StepInfo(step, 0.05, 0.0, 0.0)
        method.begin_step(now, labels)
        total = torch.zeros(())
        for micro in range(accumulation):
            v = rank * accumulation + micro
            span = slice(v * MICRO, (v + 1) * MICRO)
            output = method.loss(x[span].float() @ projection, SimpleNamespace(labels=labels[span]), now)
            (output.loss / accumulation).backward()
            total += output.loss.detach() / accumulation
        gradient, projection.grad = projection.grad / ranks, None
        if ranks > 1:
            torch.distributed.all_reduce(gradient)
        projection.data -= 0.01 * gradient
        method.end_step(now, full_parameters=None)
        losses.append(float(total))
    state: State = method.state()
    return {
        "losses": losses,
        "projection": projection.detach(),
        "rows": {name: value.tensor for name, value in state.items() if isinstance(value, Rows)},
        "replicated": {name: value.tensor for name, value in state.items() if isinstance(value, Replicated)},
    }


def joined(results: list[dict[str, Any]]) -> dict[str, Tensor]:
    rows = {name: torch.cat([result["rows"][name] for result in results]) for name in results[0]["rows"]}
    return rows | results[0]["replicated"]


def on_one_rank_of(rank: int, ranks: int, *training: Any) -> dict[str, Any]:
    """All that is run on several ranks, in one start of the processes (which costs more than the work)."""
    variants = {name: one_step(rank, ranks, settings) for name, settings in VARIANTS.items()}
    return {"variants": variants, "training": train_steps(rank, ranks, *training)}


@pytest.fixture(scope="module")
def on_ranks() -> dict[int, list[dict[str, Any]]]:
    """Steps 0 to 3 on four ranks, 4 to 7 on two; and the variants on both."""
    four = run_ranks(4, on_one_rank_of, 0, 4, None, torch.eye(DIM), timeout=600)
    trained = [result["training"] for result in four]
    two = run_ranks(2, on_one_rank_of, 4, 8, joined(trained), trained[0]["projection"], timeout=600)
    return {4: four, 2: two}


def test_any_number_of_ranks_and_a_restart_on_another_give_the_same_run(
    on_ranks: dict[int, list[dict[str, Any]]],
) -> None:
    start = torch.eye(DIM)
    whole = train_steps(0, 1, 0, 8, None, start)
    four, two = ([result["training"] for result in on_ranks[ranks]] for ranks in (4, 2))
    for results in (four, two):
        assert all(result["losses"] == results[0]["losses"] for result in results)
    assert four[0]["losses"] + two[0]["losses"] == pytest.approx(whole["losses"], rel=1e-4)
    truth, end = joined([whole]), joined(two)
    assert truth.keys() == end.keys() >= {"classifier.weight", "cluster.centre", "cluster.centre_mean_distance"}
    assert torch.equal(truth["cluster.centre_count"], end["cluster.centre_count"])
    assert torch.equal(truth["cluster.centre_valid"], end["cluster.centre_valid"])
    for name in truth:
        assert torch.allclose(truth[name].double(), end[name].double(), rtol=1e-3, atol=1e-4), name
    # the same number of ranks: the same bits
    again = train_steps(0, 1, 4, 8, joined([half := train_steps(0, 1, 0, 4, None, start)]), half["projection"])
    assert half["losses"] + again["losses"] == whole["losses"]
    assert all(torch.equal(tensor, joined([again])[name]) for name, tensor in truth.items())
