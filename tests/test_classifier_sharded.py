"""The sharded classifier against one process with materialised logits, on 1, 2 and 4 gloo ranks, in float64, classes and samples ragged."""

import copy
import functools
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from lvtrain.checkpoint.state import Rows
from lvtrain.classifier import Anchor, Numerics, OptimizerSettings, ShardedClassifier, class_range, negative_logsumexp
from lvtrain.classifier.banks import ExpectationBank
from lvtrain.classifier.kernel import on_device
from lvtrain.classifier.margins import AdaFace, ArcFace, Combined, CosFace
from lvtrain.classifier.partition import initial_centres
from lvtrain.classifier.sampling import sampled_classes
from lvtrain.errors import UserError
from lvtrain.methods import StepInfo, create_method
from lvtrain.methods.heads import centre_rates
from lvtrain.methods.supervised import batch_cosine
from lvtrain.recipe import files as recipes
from lvtrain.recipe.base import Duration
from tests.ranks import run_ranks

CLASSES, DIM, GLOBAL, VIRTUAL, STEPS = 53, 16, 24, 4, 3


def batch(kind="mixed"):
    """Embeddings and labels of STEPS global batches. "one identity": only class 50, so most ranks have no positive."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(STEPS, GLOBAL, DIM, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (STEPS, GLOBAL), generator=generator)
    if kind == "one identity":
        labels.fill_(50)
    labels[:, 3] = -1
    x[:, 3] = torch.nan  # an ignored sample may hold anything
    return x, labels


SECOND = CosFace(scale=32.0, m=0.3)  # the margin on the feature expectations


def head_of(**options):
    options = copy.deepcopy(options)  # a margin may carry statistics: each head has its own
    numerics = Numerics(**{"chunk": 7} | options.pop("numerics", {}))
    settings = dict(margin=CosFace(scale=32.0), numerics=numerics, dtype=torch.float64, seed=5)
    return ShardedClassifier(options.pop("classes", CLASSES), DIM, **(settings | options))


def bank_of(head, starts=True):
    bank = ExpectationBank(head.num_classes, DIM, head.rows, device=head.weight.device)
    if starts:
        bank.start_from(head.weight.detach())
    return bank


def anchors_of(bank, own_negatives=True, valid=None):
    """As PCO gives them; the rows are read when the list is made."""
    if bank is None:
        return []
    return [Anchor(bank.rows_tensor.double(), SECOND, valid, is_unit=True, own_negatives=own_negatives)]


def train(rank, ranks, options, phase, kind):
    """STEPS steps with VIRTUAL // ranks micro-steps each, as an engine that averages over ranks would run them."""
    head = head_of(**options)
    head.enter_phase(sample_rate=phase["sample_rate"])
    bank = bank_of(head) if "expectation" in phase else None
    x, labels = batch(kind)
    accumulation, m = VIRTUAL // ranks, GLOBAL // VIRTUAL
    losses, gradients, cos2 = [], [], []
    for step in range(STEPS):
        head.begin_step(step, labels[step])
        micro, seen, anchors = [], [], anchors_of(bank, phase.get("own_negatives", True))
        for k in range(accumulation):
            span = slice((rank * accumulation + k) * m, (rank * accumulation + k + 1) * m)
            leaf = x[step, span].clone().requires_grad_()
            output = head(leaf, labels[step, span], step=step, anchors=anchors)
            (output.loss / accumulation).backward()
            seen.append(output)
            losses.append(output.loss.item())
            cos2.append(output.cos2.item())
            micro.append(leaf.grad / ranks)
        head.end_step(lr=0.01)
        if phase.get("expectation") == "update":
            bank.update(torch.cat([one.embeddings for one in seen]), torch.cat([one.labels for one in seen]))
        gradients.append(torch.cat(micro))
    rows = bank.rows_tensor if bank else None
    return dict(losses=losses, gradients=torch.stack(gradients), weight=head.weight.detach(), rows=rows, cos2=cos2)


def reference(options, phase, kind):
    """The same on one process from the formulas, logits materialised, torch.optim.AdamW on the whole matrix."""
    head = head_of(**options)
    weight = head.weight.detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=0.01, weight_decay=0.1)
    bank = None
    if "expectation" in phase:
        bank = ExpectationBank(CLASSES, DIM, (0, CLASSES))
        bank.start_from(weight)
    margins = [head.margin, SECOND]
    x, labels = batch(kind)
    losses, gradients, cos2 = [], [], []
    for step in range(STEPS):
        valid = labels[step] >= 0
        y = labels[step].clamp(min=0)
        leaf = torch.where(valid[:, None], x[step], 0.0).requires_grad_()
        taking = sampled_classes(5, step, CLASSES, (0, CLASSES), phase["sample_rate"], labels[step])
        taking = torch.arange(CLASSES) if taking is None else taking
        own = F.one_hot(y, CLASSES)[:, taking].bool()
        unit = F.normalize(leaf)
        cosines = [unit @ F.normalize(weight)[taking].t()]
        if bank is not None:
            cosines.append(unit @ bank.rows_tensor.double()[taking].t())
        out = [cosine > (margin.filter_threshold or 2.0) for cosine, margin in zip(cosines, margins)]
        fractions = []
        for i, cosine in enumerate(cosines):
            negatives = cosines[0] if not phase.get("own_negatives", True) else cosine
            above = torch.where(own | out[i], 0.0, torch.exp(32.0 * negatives)).sum(1)
            fractions.append(
                above / torch.exp(margins[i].target_logit((cosine * own).sum(1), y, leaf.detach().norm(dim=1)))
            )
        loss = (torch.log(1 + sum(fractions)) * valid).sum() / GLOBAL
        if (
            bank is None
        ):  # one anchor: the formula is the library's cross entropy on the logits with the target's changed
            targets = margins[0].target_logit((cosines[0] * own).sum(1), y, leaf.detach().norm(dim=1))
            logits = torch.where(own, targets[:, None], (32.0 * cosines[0]).masked_fill(out[0], -torch.inf))
            library = (F.cross_entropy(logits, own.int().argmax(1), reduction="none") * valid).sum() / GLOBAL
            assert abs(library.item() - loss.item()) <= 1e-12 * loss.item()
            loss = library
        optimizer.zero_grad()
        gradient = torch.autograd.grad(loss, (leaf, weight))
        weight.grad = gradient[1]
        target = (cosines[0] * own).sum(1).detach()
        cos2.append((target.square() * valid).sum().item() / valid.sum().item())
        losses.append(loss.item())
        gradients.append(gradient[0])
        optimizer.step()
        if bank is not None and phase["expectation"] == "update":
            bank.update(F.normalize(leaf.detach()), labels[step])
        head.margin.end_step(leaf.detach().norm(dim=1), labels[step])
    return dict(
        losses=losses,
        gradients=torch.stack(gradients),
        weight=weight.detach(),
        rows=bank.rows_tensor if bank else None,
        cos2=cos2,
    )


CASES = {
    "cosface": ({}, dict(sample_rate=1.0), "mixed"),
    "sampled": ({}, dict(sample_rate=0.3), "mixed"),
    "arcface": (dict(margin=ArcFace(scale=32.0)), dict(sample_rate=1.0), "mixed"),
    "arcface, straight through": (
        dict(margin=ArcFace(scale=32.0, straight_through=True)),
        dict(sample_rate=1.0),
        "mixed",
    ),
    "combined, filtered": (
        dict(margin=Combined(scale=32.0, m1=1.2, m2=0.2, m3=0.1, filter_threshold=0.3)),
        dict(sample_rate=0.3),
        "mixed",
    ),
    "adaface": (dict(margin=AdaFace(scale=32.0)), dict(sample_rate=1.0), "mixed"),
    "nothing kept": (dict(numerics=dict(keep_mb=0.0)), dict(sample_rate=1.0), "mixed"),
    "one chunk kept": (dict(numerics=dict(keep_mb=2e-3)), dict(sample_rate=1.0), "mixed"),
    "one identity": ({}, dict(sample_rate=0.2), "one identity"),
    "two anchors": ({}, dict(sample_rate=0.3, expectation="update"), "mixed"),
    "two anchors, shared negatives": (
        {},
        dict(sample_rate=1.0, expectation="update", own_negatives=False),
        "mixed",
    ),
    "two anchors, frozen, all classes": ({}, dict(sample_rate=1.0, expectation="frozen"), "mixed"),
}


def everything(rank, ranks):
    """All multi-rank measurements of this file in one start of the ranks, which costs more than they do."""
    answers = {case: train(rank, ranks, *CASES[case]) for case in CASES}
    answers["bf16"] = bf16_gather(rank, ranks)
    if ranks == 2:
        answers["counted"] = counted(rank, ranks)
        answers["state"] = half_way(rank, ranks, None)
    if ranks == 4:
        answers["few classes"] = few_classes(rank, ranks)
    return answers


@functools.cache
def on(ranks):
    return run_ranks(ranks, everything)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_training_equals_the_formulas_on_any_number_of_ranks(case, ranks):
    options, phase, kind = CASES[case]
    answers = [answer[case] for answer in on(ranks)]
    expected = reference(options, phase, kind)
    exact = [
        sum(answers[0]["losses"][i * VIRTUAL // ranks : (i + 1) * VIRTUAL // ranks]) / (VIRTUAL // ranks)
        for i in range(STEPS)
    ]
    for got, wanted in zip(exact, expected["losses"]):
        assert abs(got - wanted) <= 1e-12 * abs(wanted)
    for answer in answers:
        assert answer["losses"] == answers[0]["losses"] and answer["cos2"] == answers[0]["cos2"]
    gradients = torch.cat([answer["gradients"] for answer in answers], dim=1)
    scale = expected["gradients"].abs().max().item()
    torch.testing.assert_close(gradients, expected["gradients"], rtol=0, atol=1e-12 * scale)
    weight = torch.cat([answer["weight"] for answer in answers])
    torch.testing.assert_close(
        weight, expected["weight"], rtol=0, atol=1e-10
    )  # AdamW divides by what may be near its eps
    if expected["rows"] is not None:
        torch.testing.assert_close(
            torch.cat([answer["rows"] for answer in answers]), expected["rows"], rtol=0, atol=2e-7
        )
    if ranks == VIRTUAL:
        for got, wanted in zip(answers[0]["cos2"], expected["cos2"]):
            assert abs(got - wanted) < 1e-12


def few_classes(rank, ranks):
    """Three classes on four ranks: one rank has none."""
    head = head_of(classes=3)
    labels = torch.tensor([0, 1, 2, 2])[rank : rank + 1]
    head.begin_step(0, torch.tensor([0, 1, 2, 2]))
    x = torch.eye(4, DIM, dtype=torch.float64)[rank : rank + 1].requires_grad_()
    loss = head(x, labels, step=0).loss
    loss.backward()
    head.end_step(lr=0.1)
    return head.rows, loss.item(), x.grad


def test_a_rank_without_classes():
    answers = [answer["few classes"] for answer in on(4)]
    assert [rows for rows, *_ in answers] == [(0, 0), (0, 1), (1, 2), (2, 3)]
    head = head_of(classes=3)
    x = torch.eye(4, DIM, dtype=torch.float64).requires_grad_()
    head.begin_step(0, torch.tensor([0, 1, 2, 2]))
    loss = head(x, torch.tensor([0, 1, 2, 2]), step=0).loss
    loss.backward()
    for _, value, _ in answers:
        assert abs(value - loss.item()) < 1e-13
    torch.testing.assert_close(torch.cat([gradient for *_, gradient in answers]) / 4, x.grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize("order", ["a loss of the rows first", "both forwards first", "backward twice"])
def test_in_whatever_order_backward_is_called_gradients_add_up(order):
    """The rows' gradient gets its memory in forward; a second micro-batch adds to what is there."""
    x, labels = batch()

    def gradient(calls):
        head = head_of()
        head.begin_step(0, labels[0])
        calls(head, [x[0, :12].clone().requires_grad_(), x[0, 12:].clone().requires_grad_()])
        return head._step.gradient

    def loss_of(head, halves, i):
        return head(halves[i], labels[0, 12 * i : 12 * i + 12], step=0).loss

    def plain(head, halves):
        loss_of(head, halves, 0).backward()
        loss_of(head, halves, 1).backward()
        if order == "backward twice":
            loss_of(head, halves, 0).backward()
        if order == "a loss of the rows first":
            head.centres_of(torch.tensor([1, 50])).square().sum().backward()

    def other(head, halves):
        if order == "a loss of the rows first":
            first = loss_of(head, halves, 0)
            head.centres_of(torch.tensor([1, 50])).square().sum().backward()
            first.backward()
            loss_of(head, halves, 1).backward()
        elif order == "both forwards first":
            losses = [loss_of(head, halves, 0), loss_of(head, halves, 1)]
            losses[0].backward()
            losses[1].backward()
        else:
            loss = loss_of(head, halves, 0)
            loss.backward(retain_graph=True)
            loss_of(head, halves, 1).backward()
            loss.backward()

    torch.testing.assert_close(gradient(other), gradient(plain), rtol=1e-13, atol=1e-13)


def test_classes_without_a_direction_are_left_out_of_their_anchor():
    """While no class is known, the second anchor adds nothing.

    Later a sample of an unknown class has no second fraction, and unknown classes are not negatives in the terms of others.
    """
    x, labels = batch()
    losses = []
    for second in (False, True):
        head = head_of()
        bank = bank_of(head, starts=False)
        for step in range(2):
            head.begin_step(step, labels[step])
            before = bank.rows_tensor.double(), bank.valid.clone()
            output = head(
                x[step].clone().requires_grad_(),
                labels[step],
                step=step,
                anchors=anchors_of(bank, valid=bank.valid) if second else [],
            )
            output.loss.backward()
            losses.append(output.loss.item())
            head.end_step(lr=0.0, weight_decay=0.0)
            bank.update(output.embeddings, output.labels)
    assert losses[0] == pytest.approx(losses[2], rel=1e-15)
    rows, known = before
    unit, valid, y = F.normalize(x[1].nan_to_num()), labels[1] >= 0, labels[1].clamp(min=0)
    own = F.one_hot(y, CLASSES).bool()
    assert 3 < (valid & ~known[y]).sum() < GLOBAL - 3, "samples of either kind"
    fractions = 0.0
    for cosine, margin, out in (
        (unit @ F.normalize(head.weight.detach()).t(), 0.4, own),
        (unit @ rows.t(), 0.3, own | ~known),
    ):
        sums = torch.exp(32.0 * cosine).masked_fill(out, 0.0).sum(1) / torch.exp(
            32.0 * ((cosine * own).sum(1) - margin)
        )
        fractions = fractions + sums * (known[y] if margin == 0.3 else 1.0)
    assert losses[3] == pytest.approx(((torch.log(1 + fractions) * valid).sum() / GLOBAL).item(), rel=1e-6)


class Reader:
    """A checkpoint in memory, as `training.checkpoint` would read it back."""

    def __init__(self, states):
        self.states = states

    def rows(self, name, start, stop):
        return torch.cat([state[name].tensor for state in self.states])[start:stop]

    def replicated(self, name):
        return self.states[0][name].tensor


def half_way(rank, ranks, given):
    """Two steps, or (given a state) the third one, with everything that has state switched on."""
    head = head_of(margin=AdaFace(scale=32.0), optimizer=OptimizerSettings(mode="row_sparse"), sample_rate=0.3)
    if given is not None:
        head.load_state(Reader(given))
    x, labels = batch()
    m = GLOBAL // ranks
    for step in range(2) if given is None else [2]:
        head.begin_step(step, labels[step])
        span = slice(rank * m, rank * m + m)
        head(x[step, span].clone().requires_grad_(), labels[step, span], step=step).loss.backward()
        head.end_step(lr=0.01)
    return head.state()


def test_state_written_on_two_ranks_is_taken_up_by_any_number():
    states = [answer["state"] for answer in on(2)]
    assert set(states[0]) == {"weight", "exp_avg", "exp_avg_sq", "row_step", "margin.mean", "margin.std"}
    assert isinstance(states[1]["weight"], Rows) and states[1]["weight"].start == class_range(CLASSES, 1, 2)[0]
    ends = {1: [half_way(0, 1, states)], 4: run_ranks(4, half_way, states)}
    for name in ("weight", "exp_avg", "row_step"):
        one, four = (torch.cat([state[name].tensor for state in ends[ranks]]) for ranks in (1, 4))
        torch.testing.assert_close(one, four, rtol=0, atol=1e-10)


def bf16_gather(rank, ranks):
    head = head_of(numerics=dict(gather="bfloat16"), dtype=torch.float32)
    x, labels = batch()
    head.begin_step(0, labels[0])
    m = GLOBAL // ranks
    span = slice(rank * m, rank * m + m)
    leaf = x[0, span].float().requires_grad_()
    output = head(leaf, labels[0, span], step=0)
    output.loss.backward()
    return output.loss.item(), leaf.grad / ranks, output.labels


def test_gather_in_bfloat16_loses_no_more_than_bfloat16_must():
    expected = reference({}, dict(sample_rate=1.0), "mixed")
    for ranks in (1, 2):
        answers = [answer["bf16"] for answer in on(ranks)]
        assert torch.equal(answers[0][2], batch()[1][0])  # labels travel bit for bit
        assert abs(answers[0][0] - expected["losses"][0]) < 2e-2
        got = torch.cat([gradient for _, gradient, _ in answers])
        assert (got - expected["gradients"][0]).norm() / expected["gradients"][0].norm() < 2e-2


def counted(rank, ranks):
    """How many collectives one micro-step runs."""
    counts, originals = {}, {}
    for name in ("all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor", "broadcast", "all_gather", "reduce"):
        originals[name] = getattr(dist, name)

        def counting(*args, _name=name, _call=originals[name], **kwargs):
            counts[_name] = counts.get(_name, 0) + 1
            return _call(*args, **kwargs)

        setattr(dist, name, counting)
    head = head_of()
    head.enter_phase(sample_rate=0.5)
    bank = bank_of(head)
    x, labels = batch()
    head.begin_step(0, labels[0])
    m = GLOBAL // ranks
    span = slice(rank * m, rank * m + m)
    output = head(x[0, span].clone().requires_grad_(), labels[0, span], step=0, anchors=anchors_of(bank))
    output.loss.backward()
    bank.update(output.embeddings, output.labels)
    head.end_step(lr=0.1)
    for name, original in originals.items():
        setattr(dist, name, original)
    return counts


def test_three_collectives_a_step():
    assert on(2)[0]["counted"] == {"all_gather_into_tensor": 1, "all_reduce": 1, "reduce_scatter_tensor": 1}


@pytest.mark.parametrize("precision", ["float32", "half"])
@pytest.mark.parametrize(
    "device,kernel",
    [("cpu", "torch"), *(pytest.param("cuda", kernel, marks=pytest.mark.gpu) for kernel in ("torch", "triton"))],
)
def test_the_device_computes_the_step_and_the_host_never_waits_for_it(device, precision, kernel):
    """Sampled classes, a margin with statistics, two anchors, and the row-sparse update; without the bank's update."""
    options, phase = dict(margin=AdaFace(scale=32.0)), dict(sample_rate=0.3, expectation="frozen")
    expected = reference(options, phase, "mixed")
    numerics, optimizer = dict(precision=precision, kernel=kernel), OptimizerSettings(mode="row_sparse")
    head = head_of(**options, dtype=torch.float32, device=device, numerics=numerics, optimizer=optimizer)
    head.enter_phase(sample_rate=phase["sample_rate"])
    anchors = [replace(one, rows=one.rows.float()) for one in anchors_of(bank_of(head))]
    x, labels = batch()
    leaves, there = [one.float().to(device).requires_grad_() for one in x], labels.to(device)
    losses = []
    try:
        for step in range(STEPS):
            if device == "cuda" and step:  # the first step compiles and allocates
                torch.cuda.set_sync_debug_mode("error")
            head.begin_step(step, labels[step])  # the labels as the data order knows them, on the host
            loss = head(leaves[step], there[step], step=step, anchors=anchors).loss
            loss.backward()
            losses.append(loss.detach())
            head.end_step(lr=0.01)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert [loss.item() for loss in losses[:1]] == pytest.approx(expected["losses"][:1], rel=1e-3)
    got = leaves[0].grad.cpu().double()
    assert (got - expected["gradients"][0]).norm() < (1e-3 if precision == "half" else 1e-5) * expected["gradients"][
        0
    ].norm()
    assert all(loss.isfinite() for loss in losses) and head.margin.mean.device.type == device


def test_what_the_recipe_says_reaches_the_classifier():
    """No value here is a default. The first update, of SGD, shows the rates of the step.

    The centres' rate stays in proportion to the backbone's. Their weight decay is the backbone's if theirs is not set.
    """
    recipe = recipes.resolve(
        {
            "name": "wiring",
            "seed": 9,
            "data": {"path": "none"},
            "backbone": {"name": "vit_nano", "embedding_dim": DIM},
            "classifier": {
                "margin": {"name": "arcface", "scale": 24.0, "m": 0.45, "filter_threshold": 0.7, "warmup": "4 steps"},
                "numerics": {"precision": "bfloat16", "gather": "bfloat16", "keep_mb": 3.0},
                "optimizer": {"name": "sgd", "mode": "row_sparse", "lr": 0.3, "moments": "bfloat16"},
            },
            "method": {"name": "pco"},
            "phases": [{"name": "only", "global_batch": GLOBAL, "micro_batches": 1, "sample_rate": 0.5}],
            "optimizer": {"lr": 0.1, "betas": [0.7, 0.95], "eps": 1e-5, "weight_decay": 0.2, "weight_decay_end": 0.6},
            "schedule": {"total": "10 steps"},
        }
    )
    method = create_method(recipe, num_classes=CLASSES, device=torch.device("cpu"))
    method.enter_phase(recipe.phases[0], first_time=True)
    head, rows = method.classifier, method.classifier.optimizer
    assert isinstance(head.margin, ArcFace) and head.margin.settings == recipe.classifier.margin
    assert (head.margin.scale, head.margin.settings.m, head.margin.filter_threshold) == (24.0, 0.45, 0.7)
    assert (head.sample_rate, head.seed) == (0.5, 9)
    assert head.numerics == Numerics("bfloat16", "torch", keep_mb=3.0, gather="bfloat16")
    expected = OptimizerSettings("sgd", "row_sparse", (0.7, 0.95), 1e-5, momentum=0.9, moments="bfloat16")
    assert rows.settings == expected
    x, labels = batch()
    now = StepInfo(
        step=0, lr=0.05, progress=0.5, epoch=0.0
    )  # the backbone's rate at half its peak, its weight decay half way from 0.2 to 0.6
    method.begin_step(now, labels[0])
    method.loss(x[0].float().requires_grad_(), SimpleNamespace(labels=labels[0]), now).loss.backward()
    before, chosen, gradient = head.weight.detach().clone(), head.chosen, head._step.gradient.clone()
    method.end_step(now, nullcontext)
    before[chosen] -= 0.15 * (gradient + 0.4 * before[chosen])
    torch.testing.assert_close(head.weight.detach(), before)
    for at, warmup, share in (
        (0, "4 steps", 0.0),
        (3, "4 steps", 0.75),
        (4, "4 steps", 1.0),
        (9, "4 steps", 1.0),
        (1, "1.5 epochs", 0.5),
        (0, "0 steps", 1.0),
    ):
        recipe.classifier.margin.warmup = Duration(warmup)
        method.begin_step(StepInfo(step=at, lr=0.05, progress=0.1, epoch=0.75 * at), labels[0])
        assert head.margin.warmup_factor == share
    own = recipe.model_copy(deep=True)
    own.classifier.optimizer.weight_decay, own.classifier.optimizer.lr = 0.01, None
    assert centre_rates(own, now) == {"lr": 0.05, "weight_decay": 0.01}


def test_batch_cosine_leaves_out_an_ignored_sample():
    x = F.normalize(torch.randn(9, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64), dim=1)
    x[4] = 0.0
    cosines = (x @ x.t())[torch.arange(9) != 4][:, torch.arange(9) != 4]
    torch.testing.assert_close(batch_cosine(x), (cosines.sum() - 8) / 56)


def test_wrong_use_is_refused():
    with pytest.raises(UserError, match="label 53"):
        head_of().begin_step(0, torch.tensor([1, 53]))
    with pytest.raises(RuntimeError, match="begin_step"):
        head_of()(torch.zeros(1, DIM), torch.zeros(1, dtype=torch.int64), step=0)
    with pytest.raises(UserError, match="num_classes"):
        head_of(classes=0)
    with pytest.raises(UserError, match="sample_rate"):
        head_of(sample_rate=1.5)


@pytest.mark.parametrize("name", ["precision", "kernel", "gather"])
def test_an_unknown_setting_is_refused(name):
    with pytest.raises(UserError, match=rf"classifier\.numerics\.{name}: 'fp8'"):
        Numerics(**{name: "fp8"})


def test_the_kernel_is_chosen_for_the_device(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert on_device(Numerics(), torch.device("cpu")).kernel == "torch"
    assert on_device(Numerics(kernel="triton"), torch.device("cuda")).kernel == "triton"
    with pytest.raises(UserError, match=r"classifier\.numerics\.kernel"):
        head_of(numerics=dict(kernel="triton"))


@pytest.mark.parametrize(
    "labels", [torch.tensor([1.0, 2.0]), torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([[1], [2]])]
)
def test_labels_that_are_no_class_ids_are_refused(labels):
    head = head_of()
    with pytest.raises(UserError, match=r"global_labels .*long"):
        head.begin_step(0, labels)
    head.begin_step(0, torch.tensor([1, 2], dtype=torch.int32))
    with pytest.raises(UserError, match=r"labels .*long"):
        head(torch.zeros(2, DIM), labels, step=0)
    with pytest.raises(UserError, match=r"labels .*long"):
        negative_logsumexp(torch.zeros(2, DIM), torch.zeros(3, DIM), labels, scale=1.0)


def test_initial_centres_do_not_depend_on_the_split():
    whole = initial_centres((0, 10_007), 8, seed=3)
    parts = [initial_centres(class_range(10_007, rank, 3), 8, seed=3) for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole)
    assert abs(whole.std().item() - 0.01) < 1e-4
