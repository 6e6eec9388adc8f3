"""IJB-B and IJB-C 1:1: templates against templates."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from lvtrain.evaluation import shown
from lvtrain.evaluation.protocol import PROTOCOLS, Flip, Grouped, Protocol, Result, Setting, followed, percent
from lvtrain.evaluation.sets import ijb
from lvtrain.weights import extract


class IjbOptions(Flip, Grouped):
    """Options of `protocol: ijb`."""

    detector_scores: bool = Field(True, description="weight each face by its detector score")


@PROTOCOLS.register("ijb")
class Ijb(Protocol):
    """1:1 template verification on IJB-B or IJB-C."""

    title = "IJB 1:1"
    options_class = IjbOptions

    @classmethod
    def matches(cls, path: Path) -> bool:
        return (path / "meta").is_dir()

    def check(self, paths: tuple[Path, ...]) -> None:
        release = ijb.read_release(paths[0])
        if self.options.groups:
            ijb.groups_of_templates(release, self.options.groups)

    def run(self, forward: extract.Forward, paths: tuple[Path, ...], setting: Setting) -> Result:
        return ijb.run(forward, paths[0], setting, **self.options.model_dump())

    @classmethod
    def figure(cls, result: Result) -> float:
        return followed(result["nearest"])

    @classmethod
    def headline(cls, result: Result) -> list[tuple[str, str]]:
        rows = [(f"TAR@FAR={far}", percent(tar)) for far, tar in result["nearest"].items()]
        impostors = result["pairs"] - result["positive_pairs"]
        rows = rows or [("TAR@FAR", f"{impostors:,} impostor pairs are too few for any FAR")]
        return [*rows, *shown.group_lines(result)]
