"""The order: an exact permutation every epoch, frozen values, independent of how it is asked, well shuffled, in constant memory."""

from __future__ import annotations

import hashlib
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from lvtrain.data import SampleOrder
from lvtrain.data import order as order_module
from lvtrain.errors import UserError


def epoch(order: SampleOrder, number: int) -> np.ndarray:
    return order.at(range(number * order.n, (number + 1) * order.n))


@pytest.mark.parametrize("window", [32, 1 << 18])
@pytest.mark.parametrize(
    ("n", "block"),
    [(1, 1), (2, 1), (3, 2), (5, 7), (97, 10), (1000, 1), (1001, 16), (4099, 64), (4096, 4096), (30007, 256)],
)
def test_each_sample_once_an_epoch(n, block, window, monkeypatch):
    monkeypatch.setattr(order_module, "WINDOW", window)
    order = SampleOrder(n, seed=3, block=block)
    seen = [epoch(order, number) for number in (0, 1, 7)]
    for ids in seen:
        assert np.array_equal(np.sort(ids), np.arange(n))
    if n > 90:
        assert not np.array_equal(seen[0], seen[1])


@pytest.mark.parametrize(("n", "block"), [(1001, 16), (300_007, 4096), (300_007, 1)])
def test_a_position_alone_gives_what_it_gives_among_others(n, block):
    order = SampleOrder(n, seed=5, block=block)
    stream = order.at(range(2 * n))
    positions = np.random.default_rng(0).integers(0, 2 * n, 300)
    assert np.array_equal(order.at(positions), stream[positions])
    assert np.array_equal(np.concatenate([order.at([p]) for p in positions[:40]]), stream[positions[:40]])
    around = np.arange(n - 20, n + 20)  # across the epoch's end
    assert np.array_equal(order.at(around), stream[around])


def test_values_are_frozen():
    """Every run ever started depends on these."""
    frozen = {
        (97, 0, 10): "2d2adcaf6793b042",
        (1001, 1, 16): "e2fa5f475626c594",
        (50_021, 2, 4096): "142525280d373fb2",
        (1009, 7, 1): "bb33c6e13a8cc0ad",
        (42_474_557, 11, 4096): "e21c4b302cb36c56",
        (260_890_076, 13, 256): "fc771e36d3f412e8",
    }
    for (n, seed, block), digest in frozen.items():
        positions = np.concatenate([np.arange(300), np.arange(max(0, n - 150), n + 150), 5 * n + np.arange(100)])
        ids = SampleOrder(n, seed, block).at(positions)
        assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16] == digest, (n, seed, block)


def test_small_permutations_are_uniform():
    """All 24 and 120 orders of 4 and 5 samples come equally often (chi-square)."""
    for n in (4, 5):
        ids = SampleOrder(n, seed=9, block=1).at(range(9_000 * n)).reshape(-1, n)
        counts = list(Counter(map(tuple, ids.tolist())).values())
        assert len(counts) == math.factorial(n)
        assert stats.chisquare(counts).pvalue > 1e-4


def test_neighbours_in_the_stream_are_independent():
    n = 16
    ids = SampleOrder(n, seed=2, block=1).at(range(8_000 * n)).reshape(-1, n)
    for a, b in ((3, 4), (0, 8), (14, 15)):
        pairs = Counter(zip(ids[:, a].tolist(), ids[:, b].tolist()))
        assert stats.chisquare([pairs[i, j] for i in range(n) for j in range(n) if i != j]).pvalue > 1e-4


@pytest.mark.parametrize("block", [1, 256, 4096])
def test_position_says_nothing_about_the_sample(block):
    n = 600_011
    ids = SampleOrder(n, seed=4, block=block).at(range(n))
    assert abs(stats.spearmanr(np.arange(n), ids).statistic) < (
        0.01 if block < 4096 else 0.2
    )  # 147 blocks of 4096 leave some
    assert abs(stats.spearmanr(ids[:-1], ids[1:]).statistic) < (0.01 if block < 4096 else 0.6)
    # two epochs have nothing to do with each other
    assert abs(stats.spearmanr(ids, SampleOrder(n, seed=4, block=block).at(range(n, 2 * n))).statistic) < 0.2


def test_classes_mix_within_a_batch():
    """Samples stored identity after identity, 20 each: a batch of 512 holds nearly as many identities as a full shuffle gives."""
    n, batch = 600_000, 512
    for block, at_least in ((1, 500), (256, 490), (4096, 480)):
        labels = SampleOrder(n, seed=6, block=block).at(range(n // batch * batch)).reshape(-1, batch) // 20
        distinct = np.array([len(np.unique(row)) for row in labels[::40]])
        assert distinct.mean() > at_least, (block, distinct.mean())


def test_reading_stays_in_whole_blocks():
    """A window of 2^18 positions touches 64 blocks of 4096 (and one short one at most), which is what a file system can follow."""
    order = SampleOrder(2_000_003, seed=1, block=4096)
    touched = np.unique(order.at(range(1 << 18)) // 4096)
    assert len(touched) <= 66


def test_memory_does_not_grow_with_n():
    peaks = []
    for n in (10_000, 260_000_000):
        order = SampleOrder(n, seed=1, block=4096)
        tracemalloc.start()
        order.at(range(5000, 9000))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2_000_000


def test_refuses_nothing_to_order():
    with pytest.raises(UserError, match="n=0"):
        SampleOrder(0, seed=1)
