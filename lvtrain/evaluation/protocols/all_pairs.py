"""All pairs of a labelled set: TAR at FAR over every genuine and impostor pair."""

from __future__ import annotations

from pathlib import Path

from lvtrain.evaluation import allpairs, extract
from lvtrain.evaluation.protocol import PROTOCOLS, Flip, Protocol, Result, Setting, percent
from lvtrain.evaluation.sources import is_labelled_set, labelled_images


@PROTOCOLS.register("all_pairs")
class AllPairs(Protocol):
    """Verification over all pairs of a labelled set."""

    title = "all pairs"
    fallback = True
    options_class = Flip

    @classmethod
    def matches(cls, path: Path) -> bool:
        return is_labelled_set(path)

    @classmethod
    def check(cls, paths: tuple[Path, ...]) -> None:
        labelled_images(paths[0])

    def run(self, forward: extract.Forward, paths: tuple[Path, ...], setting: Setting) -> Result:
        images, labels = labelled_images(paths[0])
        embeddings = setting.embed(forward, images, mirror=self.options.flip)
        return allpairs.all_pairs(embeddings, labels, device=setting.device, world=setting.world)

    @classmethod
    def figure(cls, result: Result) -> float:
        return float(next(iter(result["tar_at_far"].values()))["tar"])

    @classmethod
    def headline(cls, result: Result) -> list[tuple[str, str]]:
        rates = result["tar_at_far"].items()
        return [(f"TAR@FAR={far}", f"{percent(f['tar'])} at {f['threshold']:.4f}") for far, f in rates]
