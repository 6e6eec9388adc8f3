"""What the report shows of a run of the cluster method: phi's distribution over training, clusterings, and the other protocols' headlines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from lvtrain.evaluation import allpairs
from lvtrain.evaluation.scores import clustering
from lvtrain.report import write_report
from tests.test_report_page import Links, make_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "run", resumed=False)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        mean = 0.3 + 0.4 * np.exp(-row["step"] / 200)
        row |= {"phi_mean": mean, "phi_std": 0.06, "phi_min": mean - 0.2, "phi_max": mean + 0.3, "loss_aligning": 0.5}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluated(seed: int = 0) -> tuple[dict, np.ndarray, np.ndarray]:
    """What tools/evaluate.py writes for twelve identities with six images each."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(12), 6)
    embeddings = generator.normal(size=(12, 16))[labels] + 0.4 * generator.normal(size=(72, 16))
    results = {
        "people": {"kind": "clustering", **clustering.run(embeddings, labels, cosine=0.55)},
        "all of them": {"kind": "all_pairs", **allpairs.all_pairs(embeddings, labels)},
    }
    return {"model": "m", "benchmarks": results}, embeddings, labels


def test_concentration_is_one_figure_with_bands(run: Path) -> None:
    text = write_report(run).read_text()
    assert text.count("Concentration φ of the clusters") == 1
    assert "phi mean" not in text and "phi max" not in text, "phi's columns are drawn together, not once more each"
    assert "loss aligning" in text


def test_clusterings_and_headlines_of_what_was_evaluated(run: Path) -> None:
    found, embeddings, labels = evaluated()
    (run / "clustering").mkdir()
    (run / "clustering" / "evaluation.json").write_text(json.dumps(found))
    text = write_report(run).read_text()
    page = Links()
    page.feed(text)
    assert page.fetched == [] and page.open == []
    predicted = clustering.cluster(embeddings, "kmeans", clusters=12)
    assert f"{100 * normalized_mutual_info_score(labels, predicted):.2f}" in text
    assert "DBSCAN, joined at cosine 0.55" in text and "agglomerative, joined at cosine 0.55" in text
    tar = found["benchmarks"]["all of them"]["tar_at_far"]["1e-01"]
    assert f"{100 * tar['tar']:.2f}% at {tar['threshold']:.4f}" in text


def test_two_evaluations_are_told_apart_and_a_broken_one_is_left_out(run: Path) -> None:
    for folder in ("first", "second", "evaluation"):  # the last is where verification during training lies
        (run / folder).mkdir(exist_ok=True)
        (run / folder / "evaluation.json").write_text(json.dumps(evaluated()[0]))
    (run / "broken").mkdir()
    (run / "broken" / "evaluation.json").write_text('{"benchmarks": {"x"')
    text = write_report(run).read_text()
    assert "people, first" in text and "people, second" in text and "broken" not in text
