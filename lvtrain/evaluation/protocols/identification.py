"""Identification in a labelled set: whose image is it, among all that are enrolled, or nobody's?"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from lvtrain.evaluation.protocol import PROTOCOLS, Flip, Protocol, Result, Setting, percent
from lvtrain.evaluation.scores import identification
from lvtrain.evaluation.sources import embed_labelled, labelled_images
from lvtrain.weights import extract


class IdentificationOptions(Flip):
    """Options of `protocol: identification`."""

    enrolled: int = Field(1, ge=1, description="images of an identity in the gallery; the others are searched for")


@PROTOCOLS.register("identification")
class Identification(Protocol):
    """1:N search in a labelled set, with mates and without."""

    title = "identification"
    options_class = IdentificationOptions

    def check(self, paths: tuple[Path, ...]) -> None:
        labelled_images(paths[0])

    def run(self, forward: extract.Forward, paths: tuple[Path, ...], setting: Setting) -> Result:
        embeddings, labels = embed_labelled(forward, paths[0], setting, mirror=self.options.flip)
        return identification.identify(embeddings, labels, enrolled=self.options.enrolled)

    @classmethod
    def figure(cls, result: Result) -> float:
        return float(result["rank"]["1"])

    @classmethod
    def headline(cls, result: Result) -> list[tuple[str, str]]:
        ranks = [(f"rank {n}", percent(share)) for n, share in result["rank"].items()]
        rates = [
            (f"TPIR@FPIR={fpir}", f"{percent(found['tpir'])} at {found['threshold']:.4f}")
            for fpir, found in result["tpir_at_fpir"].items()
        ]
        return ranks + rates
