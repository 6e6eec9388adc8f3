"""TinyFace: low-resolution faces searched for among 153,428 distractors, from the published folder.

`Testing_Set/` holds the images in `Gallery_Match/`, `Probe/` and `Gallery_Distractor/`, and two MATLAB files, `gallery_match_img_ID_pairs.mat`
(`gallery_set`, `gallery_ids`) and `probe_img_ID_pairs.mat` (`probe_set`, `probe_ids`): file names and identities. All probes are mated. An
identity may have several gallery images; the best of them counts. Distractors are of nobody.

The published figures are of aligned faces: AdaFace and CVLface align them with a margin into three folders of the same names elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from lvtrain.data.images import is_image_name
from lvtrain.errors import UserError
from lvtrain.evaluation.scores.identification import search
from lvtrain.evaluation.verification import normalise

RANKS = (1, 5, 10, 20, 50)
# of the two lists, on which our sources agree
PUBLISHED = {"gallery": 4_443, "probe": 3_728, "distractors": 153_428}
_LISTS = {"gallery": "gallery_match_img_ID_pairs.mat", "probe": "probe_img_ID_pairs.mat"}
_FOLDERS = {"gallery": "Gallery_Match", "probe": "Probe", "distractors": "Gallery_Distractor"}


@dataclass(frozen=True)
class TinyFace:
    """Files in the order gallery, distractors, probes, and the identities of gallery [G] and probes [P]."""

    files: list[Path]
    gallery_labels: np.ndarray
    probe_labels: np.ndarray
    distractors: int


def testing_set(folder: Path) -> Path | None:
    """The `Testing_Set` at, in, or one folder below `folder`; None if there is none."""
    places = (folder, folder / "Testing_Set", folder / "tinyface" / "Testing_Set")
    return next((place for place in places if (place / _LISTS["probe"]).is_file()), None)


def read_tinyface(folder: str | Path, images: Path | None = None) -> TinyFace:
    """Reads the two lists and finds the files.

    Args:
        folder: the published folder.
        images: where `Gallery_Match/`, `Probe/` and `Gallery_Distractor/` lie, if not in `Testing_Set/`. A file may have another suffix
            than in the list.

    Raises:
        UserError: a list or folder missing or damaged, an image of a list missing, a probe whose identity is not in the gallery.
    """
    place = testing_set(Path(folder))
    if place is None:
        raise UserError(f"{folder} holds no Testing_Set/{_LISTS['probe']}; give TinyFace's folder as it is published")
    images = images or place
    there = {kind: _images(images / name) for kind, name in _FOLDERS.items()}
    found: dict[str, list[Path]] = {"distractors": sorted(there["distractors"].values())}
    labels = {}
    for kind, name in _LISTS.items():
        names, labels[kind] = _read_list(place / name, kind)
        missing = [one for one in names if Path(one).stem not in there[kind]]
        if missing:
            raise UserError(
                f"{images / _FOLDERS[kind]} lacks {len(missing)} of {len(names)} images of {name}, such as {missing[0]}; copy them"
            )
        found[kind] = [there[kind][Path(one).stem] for one in names]
    alone = np.setdiff1d(labels["probe"], labels["gallery"])
    if len(alone):
        raise UserError(
            f"{place}: identity {alone[0]} has a probe and no gallery image; the lists are of different releases, copy them again"
        )
    files = found["gallery"] + found["distractors"] + found["probe"]
    return TinyFace(files, labels["gallery"], labels["probe"], len(found["distractors"]))


def score(found: TinyFace, embeddings: np.ndarray) -> dict[str, Any]:
    """Rank-N of the embeddings [G + D + P, d] (any norm) of all files, as JSON values.

    Raises:
        UserError: embeddings that are not finite.
    """
    rows = normalise(embeddings)
    entries = len(found.gallery_labels) + found.distractors
    nobody = min(found.gallery_labels.min(), found.probe_labels.min()) - 1
    labels = np.append(found.gallery_labels, np.full(found.distractors, nobody))
    searches = search(rows[entries:], found.probe_labels, rows[:entries], labels)
    counts = {"gallery": len(found.gallery_labels), "probe": len(found.probe_labels), "distractors": found.distractors}
    return {**counts, "as_published": counts == PUBLISHED, "rank": searches.rank_shares(RANKS, entries)}


def _images(folder: Path) -> dict[str, Path]:
    """The images below a folder by name without suffix."""
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; TinyFace has {', '.join(_FOLDERS.values())}")
    found: dict[str, Path] = {}
    for path in (path for path in sorted(folder.rglob("*")) if is_image_name(path.name)):
        if found.setdefault(path.stem, path) != path:
            raise UserError(
                f"{path} and {found[path.stem]} have one name, which the lists give without suffix; remove one"
            )
    return found


def _read_list(path: Path, kind: str) -> tuple[list[str], np.ndarray]:
    try:
        table = loadmat(path)
        names = [str(np.asarray(one).item()) for one in np.asarray(table[f"{kind}_set"], dtype=object).ravel()]
        values = np.asarray(table[f"{kind}_ids"]).ravel()
        labels = values.astype(np.int64)
        if (labels != values).any():
            raise ValueError("identities that are not whole numbers")
    except (OSError, ValueError, KeyError, TypeError, NotImplementedError, MatReadError) as error:
        raise UserError(
            f"{path} is not TinyFace's list with {kind}_set and {kind}_ids ({error!r}); copy it again"
        ) from error
    if len(names) != len(labels) or not names:
        raise UserError(f"{path} has {len(names)} file names and {len(labels)} identities; copy it again")
    return names, labels
