"""Class sampling: r·C classes in all, a pure function of seed and step, the same on every split, every set equally likely."""

import math
from collections import Counter
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lvtrain import randomness
from lvtrain.classifier.sampling import sampled_classes

NONE = torch.tensor([], dtype=torch.int64)


def chosen_of_all(seed: int, step: int, num_classes: int, rate: float, positives: torch.Tensor) -> list[int]:
    chosen = sampled_classes(seed, step, num_classes, (0, num_classes), rate, positives)
    assert chosen is not None and chosen.dtype == torch.int64
    return chosen.tolist()


def plain(seed: int, step: int, num_classes: int, rate: float, positives: set[int]) -> list[int]:
    """The same in whole numbers of Python, class after class, in order of their places."""
    side = math.isqrt(num_classes - 1) + 1
    drawn = [int(word) % side for word in randomness.bits(seed, "class-order", step, np.arange(8 * side))]

    def place(cell: int) -> int:
        a, b = divmod(cell, side)
        for number in range(8):
            a, b = b, (a + drawn[number * side + b]) % side
        return a * side + b if a * side + b < num_classes else place(a * side + b)

    taking_part = set(positives)
    for each in sorted(range(num_classes), key=place):
        if len(taking_part) >= int(rate * num_classes):
            break
        taking_part.add(each)
    return sorted(taking_part)


def test_rate_one_takes_all() -> None:
    assert sampled_classes(0, 3, 10, (0, 10), 1.0, torch.tensor([1])) is None


@settings(deadline=None, max_examples=60)
@given(
    num_classes=st.integers(1, 700),
    rate=st.sampled_from([1e-9, 0.01, 0.1, 0.29, 0.5, 0.99]),
    batch=st.integers(0, 90),
    step=st.integers(0, 2**40),
    seed=st.integers(0, 2**31),
)
def test_it_is_the_plain_choice(num_classes: int, rate: float, batch: int, step: int, seed: int) -> None:
    positives = torch.randint(-1, num_classes, (batch,), generator=torch.Generator().manual_seed(seed))
    own = set(positives.tolist()) - {-1}
    chosen = chosen_of_all(seed, step, num_classes, rate, positives)
    assert len(chosen) == max(int(rate * num_classes), len(own)) and own <= set(chosen)
    assert chosen == plain(seed, step, num_classes, rate, own)


@settings(deadline=None, max_examples=40)
@given(
    num_classes=st.integers(1, 3000),
    ranks=st.sampled_from([1, 2, 4, 7]),
    rate=st.sampled_from([0.01, 0.1, 0.5, 0.99]),
    step=st.integers(0, 2**40),
    seed=st.integers(0, 2**31),
)
def test_any_split_gives_the_same_classes(num_classes: int, ranks: int, rate: float, step: int, seed: int) -> None:
    positives = torch.randint(-1, num_classes, (17,), generator=torch.Generator().manual_seed(seed))
    bounds = [num_classes * rank // ranks for rank in range(ranks + 1)]
    parts = [
        start + sampled_classes(seed, step, num_classes, (start, stop), rate, positives)
        for start, stop in pairwise(bounds)
    ]
    assert torch.cat(parts).tolist() == chosen_of_all(seed, step, num_classes, rate, positives)


def test_the_published_size() -> None:
    """WebFace42M at r = 0.1 and PCO's global batch: more than one block of classes, all places distinct."""
    classes, batch = 2_059_906, 24_576
    positives = torch.randint(0, classes, (batch,), generator=torch.Generator().manual_seed(0))
    chosen = np.array(chosen_of_all(0, 1, classes, 0.1, positives))
    assert len(chosen) == 205_990 and len(np.unique(chosen)) == 205_990
    assert np.isin(positives.numpy(), chosen).all()
    # in 64 parts of the range as in a uniform draw without the positives' own share
    others = np.setdiff1d(chosen, positives.numpy())
    assert stats.chisquare(np.histogram(others, 64, (0, classes))[0]).pvalue > 1e-3


@pytest.mark.parametrize(("num_classes", "taken"), [(5, 2), (9, 3)])
def test_every_set_is_equally_likely(num_classes: int, taken: int) -> None:
    steps = 20 * math.comb(num_classes, taken)
    counts = Counter(tuple(chosen_of_all(1, step, num_classes, taken / num_classes, NONE)) for step in range(steps))
    assert counts.keys() == set(combinations(range(num_classes), taken))
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_the_others_have_their_turn_and_steps_differ() -> None:
    """With 20 classes in every batch, each of the other 980 takes part with probability (100 - 20) / 980."""
    steps, positives = 400, torch.arange(0, 1000, 50)
    member = np.zeros((steps, 1000), dtype=bool)
    for step in range(steps):
        member[step, chosen_of_all(8, step, 1000, 0.1, positives)] = True
    counts = np.delete(member, positives.numpy(), axis=1).sum(0)
    rate = 80 / 980
    assert member[:, positives.numpy()].all()
    dispersion = np.sum((counts - steps * rate) ** 2) / (steps * rate * (1 - rate))
    assert 1e-3 < stats.chi2.cdf(dispersion, 979) < 1 - 1e-3
    assert len({row.tobytes() for row in member}) == steps
    # neighbours, in the order and in the square's columns, are chosen independently
    for apart in (1, 32, 33):
        together = int((member[:, 1:967] & member[:, 1 + apart : 967 + apart]).sum())
        pairs = [(i, i + apart) for i in range(1, 967)]
        own = set(positives.tolist())
        expected = sum(1.0 if {i, j} <= own else rate if {i, j} & own else rate * 79 / 979 for i, j in pairs)
        assert abs(together - steps * expected) < 4.5 * math.sqrt(steps * expected)
    assert chosen_of_all(9, 0, 1000, 0.1, positives) != np.flatnonzero(member[0]).tolist()


def test_empty_rank() -> None:
    assert len(sampled_classes(0, 0, 10, (5, 5), 0.5, torch.tensor([5, -1]))) == 0


@pytest.mark.gpu
def test_the_gpu_chooses_the_same_classes() -> None:
    labels = torch.tensor([7, -1, 90_000, 7])
    for classes in (90_001, 2_059_906):
        on_gpu = sampled_classes(3, 2, classes, (0, classes), 0.1, labels.cuda(), "cuda")
        assert on_gpu is not None and on_gpu.tolist() == chosen_of_all(3, 2, classes, 0.1, labels)


@pytest.mark.gpu
def test_labels_on_the_host_cost_the_gpu_no_synchronisation() -> None:
    labels = torch.tensor([7, -1, 90_000])
    sampled_classes(3, 1, 100_000, (0, 100_000), 0.1, labels, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        chosen = sampled_classes(3, 2, 100_000, (0, 100_000), 0.1, labels, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert chosen is not None and chosen.tolist() == chosen_of_all(3, 2, 100_000, 0.1, labels)
