"""IJB-B and IJB-C 1:1: templates against templates."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from lvtrain.evaluation import extract, ijb
from lvtrain.evaluation.protocol import PROTOCOLS, Flip, Protocol, Result, Setting, percent


class IjbOptions(Flip):
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

    def run(self, forward: extract.Forward, paths: tuple[Path, ...], setting: Setting) -> Result:
        return ijb.run(forward, paths[0], setting, **self.options.model_dump())

    @classmethod
    def figure(cls, result: Result) -> float:
        return float(next(iter(result["nearest"].values())))

    @classmethod
    def headline(cls, result: Result) -> list[tuple[str, str]]:
        return [(f"TAR@FAR={far}", percent(tar)) for far, tar in result["nearest"].items()]
