"""Counter-based randomness: frozen values, numpy and torch alike, and statistically sound against scipy's tests."""

import numpy as np
import pytest
import torch
from scipy import stats

from lvtrain import randomness

SHAPES = [(), (7,), (3, 5)]


def test_values_are_frozen() -> None:
    # changing any of these changes every run ever started
    assert randomness.key(0, "class-sampling") == 9264434023842502517
    assert [int(word) for word in randomness.bits(7, "golden", np.arange(3), 11)] == [
        9117506721811683134,
        2582989804555469712,
        13180708091709005028,
    ]
    assert float(randomness.uniform(7, "golden", 5)) == 0.3659726602191301
    assert float(randomness.normal(7, "golden", 5)) == pytest.approx(
        -0.3461437840797965, rel=1e-12
    )  # libm may round differently
    assert randomness.torch_seed(7, "golden", 5) == 3375502000518479217


@pytest.mark.parametrize("shape", SHAPES)
def test_torch_gives_numpys_bits(shape: tuple[int, ...]) -> None:
    counters = np.random.default_rng(0).integers(0, 2**62, size=shape)
    tensor = torch.as_tensor(counters)
    for before in ([], [3], [3, 2**40]):
        words = randomness.bits(5, "both", *before, counters)
        assert np.array_equal(randomness.torch_bits(5, "both", *before, tensor).numpy().view(np.uint64), words)
        assert np.array_equal(
            randomness.torch_uniform(5, "both", *before, tensor).numpy(),
            randomness.uniform(5, "both", *before, counters),
        )
    # a tensor before an integer
    assert np.array_equal(
        randomness.torch_bits(5, "both", tensor, 9).numpy().view(np.uint64), randomness.bits(5, "both", counters, 9)
    )


def test_counters_broadcast() -> None:
    table = randomness.bits(1, "grid", np.arange(4)[:, None], np.arange(6))
    assert table.shape == (4, 6) and len(np.unique(table)) == 24
    assert table[2, 3] == randomness.bits(1, "grid", 2, 3)
    assert table[2, 3] != randomness.bits(1, "grid", 3, 2)


def test_torch_needs_a_tensor() -> None:
    with pytest.raises(TypeError, match="tensor"):
        randomness.torch_bits(0, "x", 1, 2)


@pytest.mark.parametrize("draw", ["step", "class", "seed", "purpose"])
def test_uniform_along_every_counter(draw: str) -> None:
    n = 100_000
    numbers = {
        "step": lambda: randomness.uniform(3, "u", np.arange(n), 17),
        "class": lambda: randomness.uniform(3, "u", 17, np.arange(n)),
        "seed": lambda: np.array([float(randomness.uniform(seed, "u", 17)) for seed in range(5000)]),
        "purpose": lambda: np.array([float(randomness.uniform(3, f"u{i}", 17)) for i in range(5000)]),
    }[draw]()
    assert numbers.min() >= 0 and numbers.max() < 1
    assert stats.kstest(numbers, "uniform").pvalue > 1e-3
    counts, _ = np.histogram(numbers, bins=64, range=(0, 1))
    assert stats.chisquare(counts).pvalue > 1e-3


def test_neighbouring_steps_and_classes_are_independent() -> None:
    member = randomness.uniform(3, "u", np.arange(200)[:, None], np.arange(2000)) < 0.1
    for left, right in ((member[1:], member[:-1]), (member[:, 1:], member[:, :-1])):
        table = [[np.sum(left & right), np.sum(left & ~right)], [np.sum(~left & right), np.sum(~left & ~right)]]
        assert stats.chi2_contingency(table).pvalue > 1e-3
    # the number of members of a step is binomial, and so is the number of steps of a class: index of dispersion
    for axis, trials in ((1, 2000), (0, 200)):
        counts = member.sum(axis=axis)
        dispersion = np.sum((counts - 0.1 * trials) ** 2) / (trials * 0.1 * 0.9)
        assert 1e-3 < stats.chi2.cdf(dispersion, len(counts)) < 1 - 1e-3


@pytest.mark.parametrize("bit", [0, 1, 31, 32, 52, 63])
def test_every_bit_is_fair(bit: int) -> None:
    ones = int(((randomness.bits(11, "bits", np.arange(50_000)) >> np.uint64(bit)) & np.uint64(1)).sum())
    assert stats.binomtest(ones, 50_000).pvalue > 1e-3


def test_normal_is_normal() -> None:
    assert stats.kstest(randomness.normal(2, "n", np.arange(50_000)), "norm").pvalue > 1e-3


def test_torch_seed_is_accepted_and_distinct() -> None:
    seeds = {randomness.torch_seed(0, "dropout", step, rank) for step in range(50) for rank in range(8)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))
