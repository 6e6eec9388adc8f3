"""Several benchmarks of several kinds for one model, and the headline of each.

A task is written `NAME:PATH`; what protocol it is follows from what lies at PATH: a `.bin` file is 1:1 verification, a folder with `meta/` is IJB,
a labelled set (dataset, manifest, folder of people) is scored over all its pairs, or clustered or calibrated on when that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lvtrain.errors import UserError
from lvtrain.evaluation import allpairs, benchmarks, bins, calibrate, clustering, extract, ijb, megaface, verification
from lvtrain.evaluation.sources import labelled_images

Kind = Literal["verification", "ijb", "all_pairs", "clustering", "calibration", "megaface"]


@dataclass(frozen=True)
class Task:
    """One benchmark: its name, its protocol and where it lies (`paths` has two elements for MegaFace: probes and distractors)."""

    name: str
    kind: Kind
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class Setting:
    """How images are embedded, and the two switches of IJB."""

    world: extract.Ranks
    device: torch.device | str
    batch: int = 128
    image_size: int = 112
    flip: bool = True
    detector_scores: bool = True
    # of the labelled sets' protocols
    cosine: float = 0.4

    def embed(self, forward: extract.Forward, images: extract.Images, *, mirror: bool = True) -> np.ndarray:
        return extract.embed(
            forward,
            images,
            world=self.world,
            batch=self.batch,
            device=self.device,
            image_size=self.image_size,
            mirror=mirror,
        )


def parse(text: str, kind: Kind | None = None) -> Task:
    """`NAME:PATH` (or PATH alone: its last part is the name); the kind follows from the path where it is not given.

    Raises:
        UserError: the path does not exist, MegaFace without two folders.
    """
    name, colon, rest = text.partition(":")
    if not colon:
        name, rest = Path(text).stem, text
    paths = tuple(Path(part) for part in (rest.split(",") if kind == "megaface" else [rest]))
    if kind == "megaface" and len(paths) != 2:
        raise UserError(f"--megaface {text}: NAME:PROBES,DISTRACTORS is expected, two folders")
    for path in paths:
        if not path.exists():
            raise UserError(f"benchmark {name}: {path} does not exist; correct the path in NAME:PATH")
    return Task(name, kind or _kind(paths[0]), paths)


def _kind(path: Path) -> Kind:
    if path.is_file() and path.suffix != ".json":
        return "verification"
    return "ijb" if (path / "meta").is_dir() else "all_pairs"


def evaluate(
    forward: extract.Forward,
    tasks: Sequence[Task],
    setting: Setting,
    *,
    tell: Callable[[str], None] = lambda text: None,
    refused: dict[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Results by task name, JSON values with their `kind`, the same on every rank. A collective.

    With `refused` given, what a protocol refuses is put there by task name and the others go on.

    Raises:
        UserError: two tasks of one name, or whatever a protocol refuses.
    """
    names = [task.name for task in tasks]
    if len(set(names)) != len(names):
        raise UserError(
            f"names of benchmarks and calibrations must differ, got {', '.join(names)}; choose another NAME in NAME:PATH"
        )
    results = {}
    for task in tasks:
        tell(f"{task.name}: {task.kind.replace('_', ' ')} on {' and '.join(str(path) for path in task.paths)}")
        try:
            results[task.name] = {"kind": task.kind, **_PROTOCOLS[task.kind](forward, task, setting)}
        except UserError as error:
            if refused is None:
                raise
            refused[task.name] = str(error)
    return results


def _verification(forward: extract.Forward, task: Task, setting: Setting) -> dict[str, Any]:
    arguments: dict[str, Any] = {"world": setting.world, "batch": setting.batch, "device": setting.device}
    return benchmarks.verify_set(forward, task.paths[0], image_size=setting.image_size, **arguments)


def _ijb(forward: extract.Forward, task: Task, setting: Setting) -> dict[str, Any]:
    return ijb.run(
        forward,
        task.paths[0],
        world=setting.world,
        batch=setting.batch,
        device=setting.device,
        image_size=setting.image_size,
        flip=setting.flip,
        detector_scores=setting.detector_scores,
    )


def _all_pairs(forward: extract.Forward, task: Task, setting: Setting) -> dict[str, Any]:
    images, labels = labelled_images(task.paths[0])
    embeddings = setting.embed(forward, images, mirror=setting.flip)
    return allpairs.all_pairs(embeddings, labels, device=setting.device, world=setting.world)


def _clustering(forward: extract.Forward, task: Task, setting: Setting) -> dict[str, Any]:
    images, labels = labelled_images(task.paths[0])
    return clustering.run(setting.embed(forward, images, mirror=setting.flip), labels, cosine=setting.cosine)


def _calibration(forward: extract.Forward, task: Task, setting: Setting) -> dict[str, Any]:
    path = task.paths[0]
    if _kind(path) == "verification":
        images, issame = bins.read_bin(path)
        # clients compare single embeddings, without the mirror image: the threshold must be of those
        rows = setting.embed(forward, images, mirror=False)
        return calibrate.from_pairs(1 - verification.squared_distances(rows[0::2], rows[1::2]) / 2, issame)
    labelled, labels = labelled_images(path)
    return calibrate.from_people(setting.embed(forward, labelled, mirror=False), labels)


def _megaface(forward: extract.Forward, task: Task, setting: Setting) -> dict[str, Any]:
    (probes, labels), (distractors, _) = (
        _features(forward, path, setting, labelled) for path, labelled in zip(task.paths, (True, False))
    )
    return megaface.score(probes, labels, distractors, device=setting.device)


def _features(forward: extract.Forward, path: Path, setting: Setting, labelled: bool) -> tuple[np.ndarray, np.ndarray]:
    """Feature files where there are any, images of people otherwise."""
    if path.is_dir() and not (path / "dataset.json").is_file() and next(path.rglob("*.bin"), None) is not None:
        return megaface.read_features(path, labelled=labelled)
    images, labels = labelled_images(path)
    return setting.embed(forward, images, mirror=setting.flip), labels


_PROTOCOLS: dict[Kind, Callable[[extract.Forward, Task, Setting], dict[str, Any]]] = {
    "verification": _verification,
    "ijb": _ijb,
    "all_pairs": _all_pairs,
    "clustering": _clustering,
    "calibration": _calibration,
    "megaface": _megaface,
}


def headline(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What a table shows of one result: (figure, value) pairs, the most telling first."""
    kind: Kind = result["kind"]
    if kind == "verification":
        rows = [("accuracy", f"{_percent(result['accuracy'])} ± {100 * result['std']:.2f}")]
        rows += [(f"TAR@FAR={far}", _percent(tar)) for far, tar in result["tar_at_far"].items() if float(far) <= 1e-2]
        return [*rows, ("cosine threshold", f"{result['cosine_threshold']:.3f}"), ("norm", f"{result['xnorm']:.2f}")]
    if kind == "ijb":
        return [(f"TAR@FAR={far}", _percent(tar)) for far, tar in result["nearest"].items()]
    if kind == "all_pairs":
        return [
            (f"TAR@FAR={far}", f"{_percent(f['tar'])} at {f['threshold']:.4f}")
            for far, f in result["tar_at_far"].items()
        ]
    if kind == "megaface":
        rows = [(name.replace("_", "-"), _percent(share)) for name, share in result["identification"].items()]
        return rows + [(f"TAR@FAR={far}", _percent(tar)) for far, tar in result["tar_at_far"].items()]
    if kind == "clustering":
        return [
            (
                algorithm,
                "pairwise F {pairwise_f:.4f}, BCubed F {bcubed_f:.4f}, NMI {nmi:.4f}".format(**result[algorithm]),
            )
            for algorithm in clustering.ALGORITHMS
            if algorithm in result
        ]
    rows = [
        (
            f"FMR={fmr}",
            f"cosine ≥ {t['threshold']:.4f} ({t['low']:.4f} to {t['high']:.4f}), refuses {_percent(t['fnmr'])} of genuine pairs",
        )
        for fmr, t in result["thresholds"].items()
    ]
    pairs = result["impostor_pairs"]
    return rows + [
        (f"FMR={fmr}", f"{pairs:,} impostor pairs, needs {calibrate.pairs_needed(float(fmr)):,}")
        for fmr in result["unresolved"]
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"
