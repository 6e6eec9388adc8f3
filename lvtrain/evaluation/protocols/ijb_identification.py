"""IJB-B and IJB-C 1:N: mixed-media probe templates against the two galleries."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from lvtrain.evaluation.protocol import PROTOCOLS, Flip, Protocol, Result, Setting, percent
from lvtrain.evaluation.sets import ijb, ijb_galleries
from lvtrain.evaluation.sources import embed_kept
from lvtrain.weights import extract


class IjbIdentificationOptions(Flip):
    """Options of `protocol: ijb_identification`."""

    detector_scores: bool = Field(True, description="weight each face by its detector score")


@PROTOCOLS.register("ijb_identification")
class IjbIdentification(Protocol):
    """1:N search of mixed-media templates on IJB-B or IJB-C. `NAME:ijb_identification:FOLDER` chooses it."""

    title = "IJB 1:N"
    options_class = IjbIdentificationOptions

    def check(self, paths: tuple[Path, ...]) -> None:
        ijb_galleries.read_galleries(paths[0])

    def run(self, forward: extract.Forward, paths: tuple[Path, ...], setting: Setting) -> Result:
        release = ijb_galleries.read_galleries(paths[0])
        crops = ijb.AlignedCrops(release.faces, setting.image_size)
        features = embed_kept(forward, crops, release.faces.crops, setting, mirror=self.options.flip)
        scores = ijb_galleries.score_searches(release, features, detector_scores=self.options.detector_scores)
        return {**scores, "release": release.faces.name, **self.options.model_dump()}

    @classmethod
    def figure(cls, result: Result) -> float:
        return float(result["rank"]["1"])

    @classmethod
    def headline(cls, result: Result) -> list[tuple[str, str]]:
        ranks = [(f"rank {n}", percent(share)) for n, share in result["rank"].items()]
        rates = [(f"TPIR@FPIR={fpir}", percent(share)) for fpir, share in result["tpir_at_fpir"].items()]
        joined = [("rank 1, galleries joined", percent(result["joined"]["rank"]["1"]))]
        return ranks + rates + joined
