"""1:1 verification of a `.bin` set: ten folds in order, images with their mirrors, as insightface does it."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from lvtrain.evaluation import benchmarks, bins, plots, shown
from lvtrain.evaluation.protocol import PROTOCOLS, Grouped, Protocol, Result, Setting, percent
from lvtrain.weights import extract


@PROTOCOLS.register("verification")
class Verification(Protocol):
    """Pair verification on a `.bin` set (LFW, CFP-FP, AgeDB-30 and others), ten folds."""

    title = "verification"
    options_class = Grouped
    fallback = True
    has_own_part = True  # curves, histogram, faces

    @classmethod
    def matches(cls, path: Path) -> bool:
        return path.is_file() and path.suffix != ".json"

    def run(self, forward: extract.Forward, paths: tuple[Path, ...], setting: Setting) -> Result:
        return benchmarks.verify_set(forward, paths[0], setting, groups=self.options.groups)

    def check(self, paths: tuple[Path, ...]) -> None:
        images, _ = bins.read_bin(paths[0])
        if self.options.groups:
            benchmarks.groups_of_images(len(images), self.options.groups)

    @classmethod
    def figure(cls, result: Result) -> float:
        return float(result["accuracy"])

    @classmethod
    def headline(cls, result: Result) -> list[tuple[str, str]]:
        rows = [("accuracy", f"{percent(result['accuracy'])} ± {100 * result['std']:.2f}")]
        rows += [(f"TAR@FAR={far}", percent(tar)) for far, tar in result["tar_at_far"].items() if float(far) <= 1e-2]
        rows += [("cosine threshold", f"{result['cosine_threshold']:.3f}"), ("norm", f"{result['xnorm']:.2f}")]
        return [*rows, *shown.discard_lines(result), *shown.group_lines(result)]

    @classmethod
    def figures(cls, name: str, result: Result, paths: tuple[Path, ...], image_size: int) -> dict[str, Figure]:
        return {
            f"{name}_cosines": plots.cosines(name, result),
            f"{name}_hardest": plots.hardest(name, result, paths[0], image_size),
            **plots.of_discard(name, result),
            **plots.of_groups(name, result),
        }
