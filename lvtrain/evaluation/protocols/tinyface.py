"""TinyFace: rank-N of low-resolution probes in a gallery with distractors."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from lvtrain.evaluation.protocol import PROTOCOLS, Flip, Protocol, Result, Setting, percent
from lvtrain.evaluation.sets import tinyface
from lvtrain.weights import extract


class TinyFaceOptions(Flip):
    """Options of `protocol: tinyface`."""

    images: Path | None = Field(
        None, description="folder of the aligned Gallery_Match/, Probe/ and Gallery_Distractor/, if not Testing_Set/"
    )


@PROTOCOLS.register("tinyface")
class TinyFaceSearch(Protocol):
    """1:N search on TinyFace."""

    title = "TinyFace"
    options_class = TinyFaceOptions

    @classmethod
    def matches(cls, path: Path) -> bool:
        return tinyface.testing_set(path) is not None

    def check(self, paths: tuple[Path, ...]) -> None:
        tinyface.read_tinyface(paths[0], self.options.images)

    def run(self, forward: extract.Forward, paths: tuple[Path, ...], setting: Setting) -> Result:
        found = tinyface.read_tinyface(paths[0], self.options.images)
        embeddings = setting.embed(forward, found.files, mirror=self.options.flip)
        return {**tinyface.score(found, embeddings), "flip": self.options.flip}

    @classmethod
    def figure(cls, result: Result) -> float:
        return float(result["rank"]["1"])

    @classmethod
    def headline(cls, result: Result) -> list[tuple[str, str]]:
        return [(f"rank {n}", percent(share)) for n, share in result["rank"].items()]
