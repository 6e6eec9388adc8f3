"""IJB-B and IJB-C 1:N identification with mixed media, from the release's gallery and probe files.

The files are `meta/<name>_1N_gallery_*.csv` (two of them: G1 and G2 of IJB-C, S1 and S2 of IJB-B) and `meta/<name>_1N_probe_mixed.csv`. The
first two columns are the template's and the subject's number, under a header line; a template may have a line for each of its images.
The galleries share no subject, and each holds one template a subject.

Every probe is searched for in each gallery. A probe whose subject is not in it makes an unmated search. Rank-N is over the mated
searches. TPIR counts a mated search at any rank, as the IJB-C paper does. The figures of the protocol are the means of the two galleries.
`joined` is what insightface's script prints: both galleries as one, and as threshold the score that ceil(FPIR x probes) pairs of a probe and
another subject reach. It counts pairs, not searches, so its TPIR is lower.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lvtrain.errors import UserError
from lvtrain.evaluation.scores.identification import search
from lvtrain.evaluation.sets import ijb

RANKS = (1, 5, 10)
TARGETS = (1e-1, 1e-2, 1e-3)


@dataclass(frozen=True)
class Subjects:
    """Template numbers [T], ascending, and their subjects [T]."""

    templates: np.ndarray
    subjects: np.ndarray


@dataclass(frozen=True)
class Galleries:
    """The 1:N protocol of a release."""

    faces: ijb.Faces
    galleries: dict[str, Subjects]
    probes: Subjects


def read_galleries(folder: str | Path) -> Galleries:
    """Reads the faces, the galleries and the mixed probes of a release.

    Raises:
        UserError: as `ijb.read_faces`; a file missing or not a table of numbers, a template without a face, a template of two subjects, a
            subject in both galleries.
    """
    faces = ijb.read_faces(folder)
    meta = Path(folder) / "meta"
    start = f"{faces.name}_1N_gallery_"
    files = sorted(meta.glob(f"{start}*.csv"))
    if not files:
        raise UserError(
            f"{meta} holds no {start}*.csv; copy the release's gallery files there, or use the protocol ijb"
        )
    galleries = {path.stem.removeprefix(start): _subjects(path, faces) for path in files}
    subjects = np.concatenate([np.unique(gallery.subjects) for gallery in galleries.values()])
    names, counts = np.unique(subjects, return_counts=True)
    if (counts > 1).any():
        raise UserError(
            f"{meta}: subject {names[counts > 1][0]} is in two galleries, but galleries share no subject; copy the files again"
        )
    return Galleries(faces, galleries, _subjects(meta / f"{faces.name}_1N_probe_mixed.csv", faces))


def score_searches(release: Galleries, features: np.ndarray, *, detector_scores: bool = True) -> dict[str, Any]:
    """JSON values of the 1:N protocol from the features of all faces [F, d] (unnormalised).

    Returns:
        templates, probes; galleries: name -> {subjects, mated, unmated, rank, tpir_at_fpir}; rank and tpir_at_fpir (target -> share):
        means over the galleries; joined: rank, tpir_at_fpir. FPIRs that a gallery's unmated searches cannot resolve are left out.

    Raises:
        UserError: features that are not finite, a gallery that holds the subject of no probe.
    """
    names, templates = release.faces.unit_templates(features, detector_scores=detector_scores)

    def rows(found: Subjects) -> np.ndarray:
        return templates[np.searchsorted(names, found.templates)]

    probes = rows(release.probes)
    galleries: dict[str, dict[str, Any]] = {}
    for name, gallery in release.galleries.items():
        found = search(probes, release.probes.subjects, rows(gallery), gallery.subjects)
        if not found.is_mated.any():
            raise UserError(f"gallery {name} of {release.faces.name} has no subject of any probe; copy the files again")
        galleries[name] = {
            "subjects": len(np.unique(gallery.subjects)),
            "mated": int(found.is_mated.sum()),
            "unmated": int((~found.is_mated).sum()),
            "rank": found.rank_shares(RANKS, len(gallery.subjects)),
            "tpir_at_fpir": found.tpir_at_fpir(TARGETS),
        }
    whole = np.concatenate([rows(gallery) for gallery in release.galleries.values()])
    subjects = np.concatenate([gallery.subjects for gallery in release.galleries.values()])
    every = list(galleries.values())
    fpirs = [target for target in every[0]["tpir_at_fpir"] if all(target in one["tpir_at_fpir"] for one in every)]
    ranks = [n for n in every[0]["rank"] if all(n in one["rank"] for one in every)]
    return {
        "templates": len(names),
        "probes": len(probes),
        "rank": {n: float(np.mean([one["rank"][n] for one in every])) for n in ranks},
        "tpir_at_fpir": {
            target: float(np.mean([one["tpir_at_fpir"][target]["tpir"] for one in every])) for target in fpirs
        },
        "galleries": galleries,
        "joined": _joined(probes, release.probes.subjects, whole, subjects),
    }


def _joined(probes: np.ndarray, who: np.ndarray, gallery: np.ndarray, subjects: np.ndarray) -> dict[str, Any]:
    found = search(probes, who, gallery, subjects)
    others = (probes.astype(np.float32) @ gallery.astype(np.float32).T)[who[:, None] != subjects[None, :]]
    rates = {}
    for target in TARGETS[:2]:
        pairs = math.ceil(target * len(probes))
        threshold = np.partition(others, -pairs)[-pairs]
        rates[f"{target:.0e}"] = float((found.own[found.is_mated] > threshold).sum() / len(probes))
    return {"rank": found.rank_shares(RANKS, len(subjects)), "tpir_at_fpir": rates}


def _subjects(path: Path, faces: ijb.Faces) -> Subjects:
    if not path.is_file():
        raise UserError(f"{path} does not exist; IJB 1:N needs the release's gallery and probe files")
    try:
        with path.open(newline="") as file:
            lines = [line[:2] for line in csv.reader(file) if line]
        table = np.array(lines[1:]).astype(np.int64).reshape(-1, 2)
    except (ValueError, OverflowError, csv.Error) as error:
        raise UserError(
            f"{path} is not a table of template and subject numbers under a header line ({error}); copy it again"
        ) from error
    table = np.unique(table, axis=0)
    if not len(table):
        raise UserError(f"{path} names no template; copy it again")
    twice = table[1:, 0][table[1:, 0] == table[:-1, 0]]
    if len(twice):
        raise UserError(f"{path} gives template {twice[0]} two subjects; copy it again")
    ijb.check_known(faces, table[:, 0], path)
    return Subjects(table[:, 0], table[:, 1])
