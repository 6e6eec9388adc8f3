"""All pairs of a labelled set: TAR at FAR over every genuine and impostor pair."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lvtrain.evaluation import allpairs, plots, shown
from lvtrain.evaluation.group_files import groups_of
from lvtrain.evaluation.protocol import PROTOCOLS, Flip, Grouped, Protocol, Result, Setting, followed, percent
from lvtrain.evaluation.scores.discard import error_versus_discard, genuine_pairs
from lvtrain.evaluation.scores.groups import of_identities
from lvtrain.evaluation.sources import embed_labelled, identity_names, is_labelled_set, labelled_images
from lvtrain.evaluation.verification import unit_rows
from lvtrain.weights import extract


class AllPairsOptions(Flip, Grouped):
    """Options of `protocol: all_pairs`."""


@PROTOCOLS.register("all_pairs")
class AllPairs(Protocol):
    """Verification over all pairs of a labelled set."""

    title = "all pairs"
    fallback = True
    options_class = AllPairsOptions

    @classmethod
    def matches(cls, path: Path) -> bool:
        return is_labelled_set(path)

    def check(self, paths: tuple[Path, ...]) -> None:
        labelled_images(paths[0])
        if self.options.groups:
            _groups(paths[0], self.options.groups)

    def run(self, forward: extract.Forward, paths: tuple[Path, ...], setting: Setting) -> Result:
        embeddings, labels = embed_labelled(forward, paths[0], setting, mirror=self.options.flip)
        result = allpairs.all_pairs(embeddings, labels, device=setting.device, world=setting.world)
        at = {far: found["threshold"] for far, found in result["tar_at_far"].items()}
        rows, quality = unit_rows(embeddings), np.sqrt(np.einsum("nd,nd->n", embeddings, embeddings))
        genuine, lower = genuine_pairs(rows, labels, quality)
        limits = {far: at[far] for far in at if float(far) <= 1.01e-2}
        result["error_versus_discard"] = error_versus_discard(genuine, lower, limits)
        if self.options.groups:
            groups = _groups(paths[0], self.options.groups)
            result["groups"] = of_identities(rows, labels, groups, at, device=setting.device, world=setting.world)
        return result

    @classmethod
    def figure(cls, result: Result) -> float:
        return followed({far: found["tar"] for far, found in result["tar_at_far"].items()})

    @classmethod
    def headline(cls, result: Result) -> list[tuple[str, str]]:
        rates = result["tar_at_far"].items()
        rows = [(f"TAR@FAR={far}", f"{percent(f['tar'])} at {f['threshold']:.4f}") for far, f in rates]
        rows = rows or [("TAR@FAR", f"{result['negative_pairs']:,} impostor pairs are too few for any FAR")]
        return [*rows, *shown.discard_lines(result), *shown.group_lines(result)]

    @classmethod
    def figures(cls, name: str, result: Result, paths: tuple[Path, ...], image_size: int) -> dict[str, Figure]:
        return plots.of_discard(name, result) | plots.of_groups(name, result)


def _groups(path: Path, table: Path) -> dict[int, str]:
    """Label -> group, of the identities that have one."""
    found = groups_of(table, "identity", identity_names(path))
    return {label: group for label, group in enumerate(found) if group is not None}
