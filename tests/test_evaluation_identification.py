"""Identification against scikit-learn's top-k accuracy and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score

from lvtrain.errors import UserError
from lvtrain.evaluation.scores.identification import TARGETS, identify


def sample(spread: float, images: int = 400, identities: int = 60) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, identities, images) * 7  # with gaps, in no order
    labels[-1] = 10_001  # an identity of one image
    centres = generator.normal(size=(identities * 7 + 10_002, 16))
    return 3 * (centres[labels] + spread * generator.normal(size=(images, 16))), labels


def loops(rows: np.ndarray, labels: np.ndarray, enrolled: int) -> tuple[list[np.ndarray], list[int], list[tuple]]:
    """Scores and own template of every mated search; (own score or None, best other score) of every search."""
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    images: dict[int, list[int]] = {}
    for i, label in enumerate(labels):
        images.setdefault(int(label), []).append(i)
    gallery = {label: mine[:enrolled] for label, mine in sorted(images.items()) if len(mine) > enrolled}
    templates = {label: rows[mine].sum(0) / np.linalg.norm(rows[mine].sum(0)) for label, mine in gallery.items()}
    names = list(templates)
    mated, own, searches = [], [], []
    for i, label in enumerate(labels):
        if i in gallery.get(int(label), []):
            continue
        scores = np.array([rows[i] @ templates[name] for name in names])
        others = [score for name, score in zip(names, scores) if name != label]
        if label in templates:
            mated.append(scores)
            own.append(names.index(int(label)))
        searches.append((scores[own[-1]] if label in templates else None, max(others)))
    return mated, own, searches


@pytest.mark.parametrize("enrolled", [1, 2])
@pytest.mark.parametrize("spread", [0.3, 0.9])
def test_it_is_what_plain_code_says(spread: float, enrolled: int) -> None:
    embeddings, labels = sample(spread)
    found = identify(embeddings, labels, enrolled=enrolled)
    mated, own, searches = loops(embeddings, labels, enrolled)
    assert (found["gallery"], found["mated"], found["unmated"]) == (len(mated[0]), len(mated), len(searches))
    assert found["unmated"] > found["mated"]  # the identity of one image
    for rank, share in found["rank"].items():
        expected = top_k_accuracy_score(own, np.stack(mated), k=int(rank), labels=np.arange(len(mated[0])))
        assert share == pytest.approx(expected, abs=1e-9)
    for target in TARGETS:
        best = 0.0
        for threshold in [other + 1e-9 for _, other in searches]:
            if np.mean([other >= threshold for _, other in searches]) <= target:
                hits = [score is not None and score > other and score >= threshold for score, other in searches]
                best = max(best, sum(hits) / len(mated))
        if target * len(searches) < 1:
            assert f"{target:.0e}" not in found["tpir_at_fpir"]
        else:
            got = found["tpir_at_fpir"][f"{target:.0e}"]
            assert got["tpir"] == pytest.approx(best, abs=1e-9) and got["fpir"] <= target
    assert found["rank"]["1"] < 1 or spread < 0.5  # the harder sample has errors


def test_ties_count_against_the_model() -> None:
    found = identify(np.ones((6, 4)), np.array([0, 0, 1, 1, 2, 2]))
    assert found["rank"]["1"] == 0 and found["tpir_at_fpir"] == {}


def test_too_few_identities_are_refused() -> None:
    with pytest.raises(UserError, match="two identities"):
        identify(np.random.default_rng(0).normal(size=(5, 4)), np.array([0, 0, 1, 2, 3]))
