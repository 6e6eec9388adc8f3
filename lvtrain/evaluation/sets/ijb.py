"""IJB-B and IJB-C 1:1 verification from the release's loose crops and meta files, as insightface's `eval_ijbc` scores them.

Each crop is aligned by its five points. Its feature is f(image) + f(mirror), not normalised, times the detector's score.
Features of one medium are averaged, media of one template are added, and the template is L2-normalised. The score of a pair
is the cosine.

TAR at FAR is given in two ways: `tar_at_far` is the largest TAR with FAR <= target. `nearest` is as in the field's tables:
the ROC point whose FAR is nearest to the target.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_curve

from lvtrain.errors import UserError
from lvtrain.evaluation import verification
from lvtrain.evaluation.group_files import groups_of
from lvtrain.evaluation.scores.groups import Pairs, of_pairs
from lvtrain.evaluation.sources import embed_kept
from lvtrain.weights import extract

TARGETS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
# rows of `*_face_tid_mid.txt`, a number on which our sources agree
KNOWN_FACES = {"ijbb": 227_630, "ijbc": 469_375}
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Faces:
    """The faces of a release; arrays over faces [F]. `points` are [F, 5, 2] pixels, `scores` the detector's."""

    name: str
    crops: Path
    files: list[str]
    templates: np.ndarray
    media: np.ndarray
    points: np.ndarray
    scores: np.ndarray

    def unit_templates(self, features: np.ndarray, *, detector_scores: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """`template_features` of the features of all faces [F, d] (unnormalised)."""
        weights = self.scores if detector_scores else np.ones(len(self.files))
        return template_features(features, self.templates, self.media, weights)


@dataclass(frozen=True)
class Release(Faces):
    """The 1:1 protocol: faces, and template ids and labels of pairs [P]."""

    first: np.ndarray
    second: np.ndarray
    issame: np.ndarray


def read_faces(folder: str | Path, *, complete: bool = True) -> Faces:
    """Reads `meta/<name>_face_tid_mid.txt` and `<name>_name_5pts_score.txt`; crops lie in `loose_crop/`.

    Args:
        folder: the release's folder.
        complete: also refuse IJB-B or IJB-C meta files that have not the release's number of faces.

    Raises:
        UserError: a file missing or cut short, rows of the two files in different order.
    """
    folder = Path(folder)
    meta = folder / "meta"
    found = sorted(meta.glob("*_face_tid_mid.txt"))
    if len(found) != 1:
        raise UserError(
            f"{meta} holds {len(found)} files *_face_tid_mid.txt, one is expected; give the folder that has meta/ and loose_crop/"
        )
    name = found[0].name.removesuffix("_face_tid_mid.txt")
    faces = _rows(found[0], 3)
    landmarks = _rows(meta / f"{name}_name_5pts_score.txt", 12)
    if len(faces) != len(landmarks):
        raise UserError(
            f"{meta}: {len(faces)} faces but {len(landmarks)} rows of points; one of the files is cut short"
        )
    if complete and len(faces) != KNOWN_FACES.get(name, len(faces)):
        raise UserError(f"{found[0]} has {len(faces)} faces, the release has {KNOWN_FACES[name]}; copy it again")
    files = [row[0] for row in faces]
    for position, (face, row) in enumerate(zip(files, landmarks)):
        if face != row[0]:
            raise UserError(
                f"{meta}: line {position + 1} is {face} in one file and {row[0]} in the other; the rows must be in the same order"
            )
    points, scores = _points(landmarks, meta / f"{name}_name_5pts_score.txt")
    templates, media = _integers(faces, 1, found[0]), _integers(faces, 2, found[0])
    return Faces(name, folder / "loose_crop", files, templates, media, points, scores)


def read_release(folder: str | Path, *, complete: bool = True) -> Release:
    """`read_faces` and the pairs of `meta/<name>_template_pair_label.txt`.

    Raises:
        UserError: as `read_faces`, or a pair of an unknown template.
    """
    faces = read_faces(folder, complete=complete)
    pair_file = Path(folder) / "meta" / f"{faces.name}_template_pair_label.txt"
    pairs = _pairs(pair_file)
    check_known(faces, pairs[:, :2], pair_file)
    return Release(**vars(faces), first=pairs[:, 0], second=pairs[:, 1], issame=pairs[:, 2].astype(bool))


def check_known(faces: Faces, templates: np.ndarray, path: Path) -> None:
    """Refuses a file that names templates without faces.

    Raises:
        UserError: there is one.
    """
    unknown = np.setdiff1d(templates, faces.templates)
    if len(unknown):
        raise UserError(
            f"{path} names template {unknown[0]}, of which {faces.name}_face_tid_mid.txt has no face; the files are of different releases, copy them again"
        )


class AlignedCrops:
    """The release's faces, aligned on demand: a sequence of uint8 RGB [112, 112, 3]."""

    def __init__(self, release: Faces, image_size: int = 112) -> None:
        # OpenCV is an optional dependency, and only this protocol warps
        from lvtrain.data import align

        self.release, self.image_size, self._align = release, image_size, align

    def __len__(self) -> int:
        return len(self.release.files)

    def __getitem__(self, position: int, /) -> np.ndarray:
        opened = extract.decode(self.release.crops / self.release.files[position], None)
        matrix = self._align.similarity(self.release.points[position], self._align.template(self.image_size))
        return self._align.warp(opened, matrix, self.image_size)


def run(
    forward: extract.Forward,
    folder: str | Path,
    setting: extract.Setting,
    *,
    flip: bool = True,
    detector_scores: bool = True,
    complete: bool = True,
    groups: Path | None = None,
) -> dict[str, Any]:
    """Embeds a release on all ranks and scores its pairs. A collective.

    Returns the values of `score_pairs` and the settings. `groups`: the table template,group.
    """
    release = read_release(folder, complete=complete)
    crops = AlignedCrops(release, setting.image_size)
    features = embed_kept(forward, crops, release.crops, setting, mirror=flip)
    result = score_pairs(release, features, detector_scores=detector_scores, groups=groups)
    return {**result, "release": release.name, "flip": flip, "detector_scores": detector_scores}


def score_pairs(
    release: Release, features: np.ndarray, *, detector_scores: bool = True, groups: Path | None = None
) -> dict[str, Any]:
    """JSON values of the 1:1 protocol from the features of all faces [F, d] (unnormalised)."""
    names, templates = release.unit_templates(features, detector_scores=detector_scores)
    first, second = np.searchsorted(names, release.first), np.searchsorted(names, release.second)
    cosines = pair_cosines(templates, first, second)
    far, tar, _ = verification.roc(cosines, release.issame)
    # the field's table reads the curve as scikit-learn thins it by default
    thin_far, thin_tar, _ = roc_curve(release.issame, cosines)
    negatives = int((~release.issame).sum())
    kept = verification.thin(far, 400)
    by_group: dict[str, Any] = {}
    if groups is not None:
        pairs = Pairs(cosines, release.issame, first, second)
        by_group["groups"] = of_pairs(pairs, groups_of_templates(release, groups), pairs.identities())
    return {
        **by_group,
        "templates": len(names),
        "pairs": len(release.issame),
        "positive_pairs": int(release.issame.sum()),
        "tar_at_far": verification.tar_at_far(far, tar, TARGETS, negatives=negatives),
        "nearest": {
            f"{target:.0e}": nearest_tar(thin_far, thin_tar, target)
            for target in verification.resolved(TARGETS, negatives)
        },
        "roc": {"far": far[kept].tolist(), "tar": tar[kept].tolist()},
    }


def groups_of_templates(faces: Faces, path: Path) -> np.ndarray:
    """The group of every template, ascending, object [T], from a table template,group.

    Raises:
        UserError: as `group_files.groups_of`.
    """
    return groups_of(path, "template", [str(template) for template in np.unique(faces.templates)])


def nearest_tar(far: np.ndarray, tar: np.ndarray, target: float) -> float:
    """TAR of the ROC point whose FAR is nearest to the target. Of equally near ones it is the last, as in the field's script."""
    distance = np.abs(far[::-1] - target)
    return float(tar[::-1][int(np.argmin(distance))])


def template_features(
    features: np.ndarray, templates: np.ndarray, media: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ascending template ids [T] and their L2-normalised features, float64 [T, d].

    A feature is the sum over media of the mean over a medium's weighted faces.

    Raises:
        UserError: NaN features.
    """
    if not np.isfinite(features).all():
        raise verification.diverged(int((~np.isfinite(features)).any(1).sum()), len(features), "faces")
    order = np.lexsort((media, templates))
    template, medium = templates[order], media[order]
    new_template = np.append(True, template[1:] != template[:-1])
    new_medium = new_template | np.append(True, medium[1:] != medium[:-1])
    starts = np.flatnonzero(new_medium)
    counts = np.diff(np.append(starts, len(order)))
    # in blocks of columns: a float64 copy of all faces of IJB-C would be 2 GB
    fused = np.empty((int(new_template.sum()), features.shape[1]))
    first_medium = np.flatnonzero(new_template[starts])
    for column in range(0, features.shape[1], 64):
        block = features[order, column : column + 64].astype(np.float64) * weights[order, None]
        per_medium = np.add.reduceat(block, starts, axis=0) / counts[:, None]
        fused[:, column : column + 64] = np.add.reduceat(per_medium, first_medium, axis=0)
    return template[new_template], verification.normalise(fused)


def pair_cosines(features: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosines of pairs of normalised rows, float64 [P], block by block: only 8 bytes per pair are kept."""
    cosines = np.empty(len(first))
    for start in range(0, len(first), _BLOCK):
        stop = start + _BLOCK
        cosines[start:stop] = np.einsum("pd,pd->p", features[first[start:stop]], features[second[start:stop]])
    return cosines


# ------------------------------------------------------------------------------------------------------------ reading text


def _rows(path: Path, columns: int) -> list[list[str]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; IJB needs the release's meta files")
    try:
        rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text; copy it again") from error
    for number, row in enumerate(rows, start=1):
        if len(row) != columns:
            raise UserError(
                f"{path}, line {number}: {len(row)} values, {columns} expected; the file is cut short or of another kind"
            )
    return rows


def _points(rows: list[list[str]], path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Five points of every face, float64 [F, 5, 2], and its detector score [F]."""
    try:
        numbers = np.array([row[1:] for row in rows], dtype=np.float64)
    except ValueError as error:
        raise UserError(f"{path} holds something else than numbers ({error})") from error
    points = numbers[:, :10].reshape(-1, 5, 2)
    bad = np.flatnonzero(~np.isfinite(numbers).all(1) | (np.ptp(points, axis=1) == 0).all(1))
    if len(bad):
        raise UserError(f"{path}, line {bad[0] + 1}: points or score are not finite, or the points coincide")
    return points, numbers[:, 10]


def _integers(rows: list[list[str]], column: int, path: Path) -> np.ndarray:
    try:
        return np.array([row[column] for row in rows]).astype(np.int64)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{path}: template and media ids must be integers ({error})") from error


def _pairs(path: Path) -> np.ndarray:
    """int64 [P, 3]: template, template, label. One call parses the 15.7 million lines of IJB-C in seconds."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; IJB needs the release's meta files")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy only warns where it meets something else than a number, and stops there
        try:
            values = np.fromstring(path.read_text(), dtype=np.int64, sep=" ")
        except (ValueError, DeprecationWarning) as error:
            raise UserError(f"{path} holds something else than numbers") from error
    if len(values) % 3 or not len(values):
        raise UserError(f"{path} holds {len(values)} numbers, three a pair are expected; the file is cut short")
    pairs = values.reshape(-1, 3)
    if not np.isin(pairs[:, 2], (0, 1)).all() or len(np.unique(pairs[:, 2])) != 2:
        raise UserError(f"{path}: the third column must be 0 or 1, and both must occur")
    return pairs
