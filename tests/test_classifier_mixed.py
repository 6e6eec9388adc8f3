"""Mixup's loss with two targets a sample, on 1, 2 and 4 ranks, against one process with materialised logits and soft labels."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from timm.data.mixup import Mixup, mixup_target
from timm.loss import SoftTargetCrossEntropy

from lvtrain.classifier import Numerics, ShardedClassifier
from lvtrain.classifier.margins import ArcFace, CosFace
from lvtrain.classifier.mixed import mix, partner_labels
from lvtrain.classifier.sampling import sampled_classes
from lvtrain.methods.finetune import Mixup as Section
from tests.ranks import run_ranks

CLASSES, DIM, BATCH, MICRO = 53, 16, 24, 4
CASES = {
    "cosface": (CosFace(scale=32.0, m=0.4), 1.0, {}, 0.7),
    "sampled": (CosFace(scale=32.0, m=0.4), 0.3, {}, 0.15),
    "arcface, filtered": (ArcFace(scale=32.0, filter_threshold=0.3), 0.3, {}, 0.5),
    "running maximum": (CosFace(scale=700.0), 1.0, {}, 0.9),
    "nothing kept": (CosFace(scale=32.0), 1.0, {"keep_mb": 0.0}, 0.7),
}


def batch():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(BATCH, DIM, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
    labels[4] = labels[9] = labels[8] = 7  # 8 and 9 are partners of one class
    labels[1], x[1] = -1, torch.nan
    return x, labels


def run(rank, ranks, case):
    margin, rate, numerics, share = CASES[case]
    head = ShardedClassifier(
        CLASSES,
        DIM,
        margin=margin,
        numerics=Numerics(chunk=7, **numerics),
        dtype=torch.float64,
        seed=5,
        sample_rate=rate,
    )
    x, labels = batch()
    head.begin_step(0, labels)
    size, count = BATCH // MICRO, MICRO // ranks
    losses, gradients = [], []
    for k in range(count):
        span = slice((rank * count + k) * size, (rank * count + k + 1) * size)
        leaf = x[span].clone().requires_grad_()
        output = head(leaf, labels[span], step=0, share=share)
        (output.loss / count).backward()
        losses.append(output.loss.item())
        gradients.append(leaf.grad / ranks)
    rows = head._step.gradient
    if head.chosen is not None:
        rows = torch.zeros_like(head.weight).index_copy_(0, head.chosen, rows)
    return sum(losses) / count, torch.cat(gradients), rows


def everything(rank, ranks):
    return {case: run(rank, ranks, case) for case in CASES}


@functools.cache
def on(ranks):
    return run_ranks(ranks, everything)


def expected(case):
    margin, rate, _, share = CASES[case]
    x, labels = batch()
    head = ShardedClassifier(CLASSES, DIM, margin=margin, dtype=torch.float64, seed=5)
    weight = head.weight.detach().clone().requires_grad_()
    leaf = torch.where((labels >= 0)[:, None], x, 0.0).requires_grad_()
    y = labels.clamp(min=0)
    # a micro-batch at a time; pairs with an image that could not be decoded keep their own label
    parts = []
    for part in labels.view(MICRO, -1):
        own = F.one_hot(part.clamp(min=0), CLASSES).double()
        soft = share * own + (1 - share) * own.flip(0)
        timms = mixup_target(part.clamp(min=0), CLASSES, share, 0.0)
        torch.testing.assert_close(soft.float(), timms)
        parts.append(torch.where(((part >= 0) & (part.flip(0) >= 0))[:, None], soft, own))
    soft = torch.cat(parts)
    cosine = F.normalize(leaf) @ F.normalize(weight).t()
    with_margin = torch.stack([margin.target_logit(cosine[:, j], y) for j in range(CLASSES)], dim=1)
    logits = soft * with_margin + (1 - soft) * margin.scale * cosine
    taking = sampled_classes(5, 0, CLASSES, (0, CLASSES), rate, labels)
    out = torch.ones(CLASSES, dtype=torch.bool)
    out[torch.arange(CLASSES) if taking is None else taking] = False
    gone = out[None, :].expand(BATCH, -1)
    if margin.filter_threshold is not None:
        gone = gone | ((cosine > margin.filter_threshold) & (soft == 0))
    each = -(soft * logits.masked_fill(gone, -1e30).log_softmax(1)).sum(1)
    if not gone.any():
        valid = labels >= 0
        library = SoftTargetCrossEntropy()(logits[valid], soft[valid])
        assert library.item() == pytest.approx(each[valid].mean().item(), rel=1e-12)
    loss = torch.where(labels >= 0, each, 0.0).sum() / BATCH
    return loss.item(), *torch.autograd.grad(loss, (leaf, weight))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_two_targets_equal_soft_labels_on_any_number_of_ranks(case, ranks):
    answers = [answer[case] for answer in on(ranks)]
    loss, by_x, by_weight = expected(case)
    assert answers[0][0] == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(
        torch.cat([x for _, x, _ in answers]), by_x, rtol=0, atol=1e-12 * by_x.abs().max().item()
    )
    rows = torch.cat([rows for *_, rows in answers])
    torch.testing.assert_close(rows, by_weight, rtol=0, atol=1e-12 * by_weight.abs().max().item())


def test_images_are_mixed_as_timm_mixes_them():
    images = torch.randn(6, 3, 4, 4)
    labels = torch.tensor([3, 1, 4, 1, 5, -1])
    mixup = Mixup(mixup_alpha=0.2, prob=1.0, num_classes=9)
    mixup._params_per_batch = lambda: (0.3, False)
    theirs, _ = mixup(images.clone(), labels.clamp(min=0))
    ours = mix(images, labels, 0.3)
    torch.testing.assert_close(ours[1:5], theirs[1:5])
    assert torch.equal(ours[[0, 5]], images[[0, 5]])  # the last could not be decoded
    assert partner_labels(labels, 1).tolist() == [3, 5, 1, 4, 1, -1]
    assert partner_labels(labels, 2).tolist() == [4, 1, 3, 1, 5, -1]


def test_shares_are_beta_draws_of_a_share_of_the_steps():
    section = Section(alpha=0.2, probability=0.1)
    shares = np.array([section.share(3, step) for step in range(4000)])
    mixed = shares[shares < 1]
    assert stats.binomtest(len(mixed), len(shares), 0.1).pvalue > 1e-3
    assert stats.kstest(mixed, stats.beta(0.2, 0.2).cdf).pvalue > 1e-3
    assert section.share(3, 7) == shares[7]
