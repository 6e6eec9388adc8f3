"""Clustering of a labelled set, and how well the clusters are the identities."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from lvtrain.evaluation.protocol import PROTOCOLS, Flip, Protocol, Result, Setting
from lvtrain.evaluation.scores import clustering
from lvtrain.evaluation.sources import embed_labelled, labelled_images
from lvtrain.weights import extract

_NAMES = {"kmeans": "K-means, given the number of identities", "dbscan": "DBSCAN", "agglomerative": "agglomerative"}
_SHARES = ("pairwise_f", "bcubed_precision", "bcubed_recall", "bcubed_f", "nmi")


class ClusteringOptions(Flip):
    """Options of `protocol: clustering`."""

    cosine: float = Field(0.4, description="cosine from which DBSCAN and agglomeration join two faces")


@PROTOCOLS.register("clustering")
class Clustering(Protocol):
    """K-means, DBSCAN and agglomerative clustering of a labelled set, against its identities."""

    title = "clustering"
    options_class = ClusteringOptions
    has_own_part = True

    def check(self, paths: tuple[Path, ...]) -> None:
        labelled_images(paths[0])

    def run(self, forward: extract.Forward, paths: tuple[Path, ...], setting: Setting) -> Result:
        embeddings, labels = embed_labelled(forward, paths[0], setting, mirror=self.options.flip)
        return clustering.run(embeddings, labels, cosine=self.options.cosine)

    @classmethod
    def figure(cls, result: Result) -> float:
        return float(result["kmeans"]["bcubed_f"])

    @classmethod
    def headline(cls, result: Result) -> list[tuple[str, str]]:
        text = "pairwise F {pairwise_f:.4f}, BCubed F {bcubed_f:.4f}, NMI {nmi:.4f}"
        return [(name, text.format(**result[name])) for name in clustering.ALGORITHMS if name in result]

    @classmethod
    def rows(cls, result: Result) -> list[dict[str, str]]:
        rows = []
        for algorithm in clustering.ALGORITHMS:
            if algorithm not in result:
                continue
            scores = result[algorithm]
            joined = "" if algorithm == "kmeans" else f", joined at cosine {result['cosine']:.2f}"
            row = {
                "images": f"{result['images']:,}",
                "identities": f"{result['people']:,}",
                "algorithm": _NAMES[algorithm] + joined,
                "clusters": f"{scores['clusters']:,}",
            }
            rows.append(row | {name: f"{100 * scores[name]:.2f}" for name in _SHARES})
        return rows
