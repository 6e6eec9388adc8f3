"""All-pairs TAR at FAR against the full matrix and scikit-learn's ROC; the same counts in any tiling and on several ranks."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_curve

from lvtrain.distributed.world import World
from lvtrain.errors import UserError
from lvtrain.evaluation.allpairs import BINS, all_pairs
from tests.ranks import run_ranks


def people(count: int = 900, identities: int = 90, dim: int = 24, noise: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, identities, count)
    centres = generator.normal(size=(identities, dim))
    return (centres[labels] + noise * generator.normal(size=(count, dim))) * 7.0, labels


def reference(embeddings: np.ndarray, labels: np.ndarray, target: float) -> float:
    """The whole matrix in float64, every threshold."""
    rows = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    first, second = np.triu_indices(len(rows), 1)
    far, tar, _ = roc_curve(labels[first] == labels[second], (rows @ rows.T)[first, second], drop_intermediate=False)
    return float(tar[far <= target].max())


@pytest.fixture
def floored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks for a floor as it would for a large set."""
    monkeypatch.setattr("lvtrain.evaluation.allpairs._SMALL", 0)


@pytest.mark.parametrize("tile", [64, 901, 331])
@pytest.mark.parametrize("targets", [(1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6), (1e-3, 1e-4)])
@pytest.mark.usefixtures("floored")
def test_against_the_whole_matrix(tile: int, targets: tuple[float, ...]) -> None:
    embeddings, labels = people()
    result = all_pairs(embeddings, labels, tile=tile, targets=targets)
    same = labels[:, None] == labels[None, :]
    assert result["positive_pairs"] == (same.sum() - 900) // 2
    assert result["positive_pairs"] + result["negative_pairs"] == 900 * 899 // 2
    assert [float(far) for far in result["tar_at_far"]] == [t for t in targets if t > 2e-6]  # 4e5 negatives
    for far, figures in result["tar_at_far"].items():
        truth = reference(embeddings, labels, float(far))
        assert figures["tar"] - 1e-9 <= truth <= figures["tar_upper"] + 1e-9
        # 8000 positives in bins of 1e-6 do not share a bin with the threshold
        assert abs(figures["tar"] - truth) < 1e-9
        assert figures["far"] <= float(far)


@pytest.mark.usefixtures("floored")
def test_tiling_and_floor_change_nothing() -> None:
    embeddings, labels = people(500)
    alike = [all_pairs(embeddings, labels, tile=tile, targets=(1e-1, 1e-4)) for tile in (37, 128, 1000)]
    assert alike[0] == alike[1] == alike[2]
    # a large first target makes the floor -1: no pair is left out of the histogram
    assert (
        all_pairs(embeddings, labels, targets=(0.6, 1e-1, 1e-4))["tar_at_far"]["1e-04"]
        == alike[0]["tar_at_far"]["1e-04"]
    )


@pytest.mark.usefixtures("floored")
def test_misled_sample_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A floor far too high leaves too few negatives above it: the pass is repeated without a floor."""
    embeddings, labels = people(400)
    expected = all_pairs(embeddings, labels)
    monkeypatch.setattr("lvtrain.evaluation.allpairs._floor", lambda *_: 0.99)
    assert all_pairs(embeddings, labels) == expected


def on_rank(rank: int, size: int) -> dict:
    embeddings, labels = people(300)
    return all_pairs(embeddings, labels, tile=50, world=World(rank, size, rank, torch.device("cpu")))


def test_ranks_share_the_tiles() -> None:
    embeddings, labels = people(300)
    alone = all_pairs(embeddings, labels, tile=50)
    assert all(result == alone for result in run_ranks(2, on_rank))


def test_swapped_labels_show() -> None:
    embeddings, labels = people(noise=0.1)
    good = all_pairs(embeddings, labels)["tar_at_far"]["1e-04"]["tar"]
    labels[::2] = np.roll(labels[::2], 1)
    assert good > 0.99 > 0.6 > all_pairs(embeddings, labels)["tar_at_far"]["1e-04"]["tar"]


def test_identical_embeddings_and_ends_of_the_range() -> None:
    """Cosines of exactly 1 and -1 lie in the outermost bins."""
    embeddings = np.array([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    result = all_pairs(embeddings, np.array([0, 0, 1, 1]), targets=(0.5,))
    assert result["tar_at_far"]["5e-01"]["tar"] == 1.0
    assert result["tar_at_far"]["5e-01"]["threshold"] <= 1 - 1 / BINS


def test_refusals() -> None:
    embeddings, labels = people(20)
    with pytest.raises(UserError, match="19 labels"):
        all_pairs(embeddings, labels[:-1])
    with pytest.raises(UserError, match="several images"):
        all_pairs(embeddings, np.arange(20))
    embeddings[3, 0] = np.inf
    with pytest.raises(UserError, match="1 of 20 embeddings"):
        all_pairs(embeddings, labels)
