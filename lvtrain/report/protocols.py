"""What tools/evaluate.py left in a run's folder (`RUN/NAME/evaluation.json`): clusterings of people, and every other protocol's headline."""

from __future__ import annotations

from lvtrain.evaluation import suite
from lvtrain.evaluation.clustering import ALGORITHMS
from lvtrain.report.files import Row, RunFiles

_NAMES = {"kmeans": "K-means, told the number of people", "dbscan": "DBSCAN", "agglomerative": "agglomerative"}


def clusterings(run: RunFiles) -> list[Row]:
    """One row an algorithm and set of people, shares as percentages."""
    rows = []
    for benchmark, result in _results(run):
        if result["kind"] != "clustering":
            continue
        for algorithm in ALGORITHMS:
            if algorithm not in result:
                continue
            scores = result[algorithm]
            joined = "" if algorithm == "kmeans" else f", joined at cosine {result['cosine']:.2f}"
            figures = ("pairwise_f", "bcubed_precision", "bcubed_recall", "bcubed_f", "nmi")
            rows.append(
                {
                    "benchmark": benchmark,
                    "images": f"{result['images']:,}",
                    "people": f"{result['people']:,}",
                    "algorithm": _NAMES[algorithm] + joined,
                    "clusters": f"{scores['clusters']:,}",
                    **{name: f"{100 * scores[name]:.2f}" for name in figures},
                }
            )
    return rows


def headlines(run: RunFiles) -> list[Row]:
    """What `tools/evaluate.py` prints of all protocols but 1:1 verification and clustering, which have tables of their own."""
    return [
        {"benchmark": benchmark, "protocol": result["kind"].replace("_", " "), "figure": figure, "value": value}
        for benchmark, result in _results(run)
        if result["kind"] not in ("clustering", "verification")
        for figure, value in suite.headline(result)
    ]


def _results(run: RunFiles) -> list[tuple[str, Row]]:
    return [
        (f"{name}, {folder}" if len(run.protocols) > 1 else name, result)
        for folder, found in run.protocols.items()
        for name, result in found.items()
        if "kind" in result
    ]
