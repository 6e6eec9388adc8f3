"""MegaFace: rank-1 identification among distractors, and TAR at FAR."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lvtrain.evaluation.protocol import PROTOCOLS, Flip, Protocol, Result, Setting, percent
from lvtrain.evaluation.sets import megaface
from lvtrain.evaluation.sources import embed_labelled, labelled_images
from lvtrain.weights import extract


@PROTOCOLS.register("megaface")
class MegaFace(Protocol):
    """Two paths, probes and distractors: folders of feature files, or of images (one folder per identity)."""

    title = "MegaFace"
    options_class = Flip
    paths = 2

    def check(self, paths: tuple[Path, ...]) -> None:
        for path in paths:
            if _holds_features(path):
                megaface.read_feature(next(path.rglob("*.bin")))  # a million of them would take long
            else:
                labelled_images(path)

    def run(self, forward: extract.Forward, paths: tuple[Path, ...], setting: Setting) -> Result:
        probes, labels = self._features(forward, paths[0], setting, labelled=True)
        distractors, _ = self._features(forward, paths[1], setting, labelled=False)
        return megaface.score(probes, labels, distractors, device=setting.device)

    def _features(
        self, forward: extract.Forward, path: Path, setting: Setting, *, labelled: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        if _holds_features(path):
            return megaface.read_features(path, labelled=labelled)
        return embed_labelled(forward, path, setting, mirror=self.options.flip)

    @classmethod
    def figure(cls, result: Result) -> float:
        return float(next(iter(result["identification"].values())))

    @classmethod
    def headline(cls, result: Result) -> list[tuple[str, str]]:
        rows = [(name.replace("_", "-"), percent(share)) for name, share in result["identification"].items()]
        return rows + [(f"TAR@FAR={far}", percent(tar)) for far, tar in result["tar_at_far"].items()]


def _holds_features(path: Path) -> bool:
    """Whether a folder holds feature files, not images."""
    return path.is_dir() and not (path / "dataset.json").is_file() and next(path.rglob("*.bin"), None) is not None
