"""Cosine thresholds for given false match rates, of single embeddings, as a client compares them."""

from __future__ import annotations

from pathlib import Path

from lvtrain.evaluation import bins, verification
from lvtrain.evaluation.protocol import PROTOCOLS, Protocol, Result, Setting, percent
from lvtrain.evaluation.scores import calibrate
from lvtrain.evaluation.sources import embed_labelled, is_labelled_set, labelled_images
from lvtrain.weights import extract


@PROTOCOLS.register("calibration")
class Calibration(Protocol):
    """Thresholds for false match rates, with intervals, from a labelled set or a verification set."""

    title = "calibration"

    def check(self, paths: tuple[Path, ...]) -> None:
        if is_labelled_set(paths[0]):
            labelled_images(paths[0])
        else:
            bins.read_bin(paths[0])

    def run(self, forward: extract.Forward, paths: tuple[Path, ...], setting: Setting) -> Result:
        path = paths[0]
        if is_labelled_set(path):
            return calibrate.from_people(*embed_labelled(forward, path, setting, mirror=False))
        encoded, issame = bins.read_bin(path)
        rows = setting.embed(forward, encoded, mirror=False)
        return calibrate.from_pairs(1 - verification.squared_distances(rows[0::2], rows[1::2]) / 2, issame)

    @classmethod
    def figure(cls, result: Result) -> float:
        return float(1 - next(iter(result["thresholds"].values()))["fnmr"] if result["thresholds"] else 0.0)

    @classmethod
    def headline(cls, result: Result) -> list[tuple[str, str]]:
        rows = []
        for fmr, t in result["thresholds"].items():
            span = f"cosine ≥ {t['threshold']:.4f} ({t['low']:.4f} to {t['high']:.4f})"
            rows.append((f"FMR={fmr}", f"{span}, refuses {percent(t['fnmr'])} of genuine pairs"))
        pairs = result["impostor_pairs"]
        for fmr in result["unresolved"]:
            needed = calibrate.pairs_needed(float(fmr))
            rows.append((f"FMR={fmr}", f"{pairs:,} impostor pairs, needs {needed:,}"))
        return rows
