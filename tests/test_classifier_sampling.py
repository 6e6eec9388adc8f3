"""Class sampling: a pure function of (seed, step, class), the same on every split, with the share asked for."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lvtrain import randomness
from lvtrain.classifier.partition import sampled_classes

NONE = torch.tensor([], dtype=torch.int64)


def test_rate_one_takes_all() -> None:
    assert sampled_classes(0, 3, (0, 10), 1.0, torch.tensor([1])) is None


def test_membership_is_the_hash_and_the_positives() -> None:
    positives = torch.tensor([70_003, 5, 5, 99_999, -1, 0, 100_000, 123])
    chosen = sampled_classes(4, 9, (100, 100_000), 0.1, positives)
    assert chosen is not None and chosen.dtype == torch.int64
    classes = np.arange(100, 100_000)
    member = randomness.uniform(4, "class-sampling", 9, classes) < 0.1
    member[[70_003 - 100, 99_999 - 100, 123 - 100]] = True  # 5 and 0 lie before, 100 000 behind, -1 is ignored
    assert np.array_equal(chosen.numpy(), np.flatnonzero(member))


@settings(deadline=None, max_examples=40)
@given(
    num_classes=st.integers(1, 3000),
    ranks=st.integers(1, 7),
    rate=st.sampled_from([0.01, 0.1, 0.5, 0.99]),
    step=st.integers(0, 2**40),
    seed=st.integers(0, 2**31),
)
def test_any_split_gives_the_same_classes(num_classes: int, ranks: int, rate: float, step: int, seed: int) -> None:
    positives = torch.randint(-1, num_classes, (17,), generator=torch.Generator().manual_seed(seed))
    whole = sampled_classes(seed, step, (0, num_classes), rate, positives)
    bounds = [num_classes * rank // ranks for rank in range(ranks + 1)]
    parts = [start + sampled_classes(seed, step, (start, stop), rate, positives) for start, stop in pairwise(bounds)]
    assert whole is not None and torch.equal(torch.cat(parts), whole)
    assert set(positives[positives >= 0].tolist()) <= set(whole.tolist())


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3])
def test_share_is_binomial(rate: float) -> None:
    n, steps = 5000, 200
    counts = np.array([len(sampled_classes(1, step, (0, n), rate, NONE)) for step in range(steps)])
    assert stats.binomtest(int(counts.sum()), n * steps, rate).pvalue > 1e-3
    dispersion = np.sum((counts - n * rate) ** 2) / (n * rate * (1 - rate))
    assert 1e-3 < stats.chi2.cdf(dispersion, steps) < 1 - 1e-3


def test_every_class_has_its_turn_and_steps_differ() -> None:
    member = np.zeros((300, 1000), dtype=bool)
    for step in range(300):
        member[step, sampled_classes(8, step, (0, 1000), 0.1, NONE).numpy()] = True
    counts = member.sum(0)
    expected = stats.binom(300, 0.1)
    assert expected.ppf(1e-7) <= counts.min() and counts.max() <= expected.ppf(1 - 1e-7)
    assert len({row.tobytes() for row in member}) == 300
    assert not np.array_equal(member[0], randomness.uniform(9, "class-sampling", 0, np.arange(1000)) < 0.1)


def test_empty_rank() -> None:
    assert len(sampled_classes(0, 0, (5, 5), 0.5, torch.tensor([5, -1]))) == 0


@pytest.mark.gpu
def test_labels_on_the_host_cost_the_gpu_no_synchronisation() -> None:
    labels = torch.tensor([7, -1, 90_000])
    sampled_classes(3, 1, (0, 100_000), 0.1, labels, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        chosen = sampled_classes(3, 2, (0, 100_000), 0.1, labels, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert chosen is not None and torch.equal(chosen.cpu(), sampled_classes(3, 2, (0, 100_000), 0.1, labels))
