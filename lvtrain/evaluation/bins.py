"""insightface's verification sets (`lfw.bin`, `cfp_fp.bin`, ...): a reader that runs no code of the file, a writer, and checks.

A `.bin` file is a pickle of `(images, issame)`: `2 P` encoded images (bytes, or the uint8 array that OpenCV's encoder returns) and P booleans.
The pairs form ten consecutive folds; the order is part of the benchmark.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lvtrain.errors import UserError
from lvtrain.evaluation.bin_pickle import PlainArray, Refused, load
from lvtrain.files import atomic
from lvtrain.files.checked import check_regular
from lvtrain.files.reading import parse_json

FOLDS = 10
# pairs of the published sets; a file with such a name and another count has lost some
KNOWN_PAIRS = {"lfw": 6000, "agedb_30": 6000, "calfw": 6000, "cplfw": 6000, "cfp_fp": 7000, "cfp_ff": 7000}


def read_bin(path: str | Path, *, strict: bool = True) -> tuple[list[bytes], np.ndarray]:
    """The encoded images (2 P of them, pair i is images 2i and 2i+1) and `issame`, bool [P].

    A sidecar `<path>.json`, which `write_bin` writes, is compared with the file: a changed byte is an error.

    Args:
        path: the set.
        strict: also refuse a set whose pairs are not a multiple of ten, or whose folds hold unequal numbers of positive pairs (a fold is missing, or
            pairs were shuffled). The published sets are recognised by name and count instead.

    Raises:
        UserError: no such file, cut short, not such a pickle, a name outside the format, counts that do not agree, or a published set with
            pairs missing.
    """
    path = Path(path)
    check_regular(path)
    data = path.read_bytes()
    try:
        content = load(data)
    except Refused as error:
        raise UserError(f"{path} is not a plain verification set: it asks for {error}; refused") from error
    except Exception as error:
        # a damaged pickle can fail in any way; no part of it has been used
        raise UserError(
            f"{path} is cut short or not a verification set ({type(error).__name__}: {error}); copy it again"
        ) from error
    images, issame = _plain(content, path)
    _check_sidecar(path, data, len(issame))
    if strict:
        check_folds(issame, path)
    return images, issame


def write_bin(
    path: str | Path,
    images: Sequence[bytes],
    issame: Sequence[bool] | np.ndarray,
    *,
    about: dict[str, Any] | None = None,
) -> None:
    """Writes a verification set readable by insightface and by `read_bin`, and a sidecar `<path>.json` with counts and sha256.

    Args:
        path: the set's file, usually `*.bin`.
        images: 2 P encoded images (JPEG or PNG), pair i is images 2i and 2i+1.
        issame: P booleans, ten folds one after the other.
        about: further entries of the sidecar, e.g. how the faces were aligned.

    Raises:
        UserError: counts that do not fit, or an image that is not bytes.
    """
    path = Path(path)
    flags = [bool(flag) for flag in issame]
    if len(images) != 2 * len(flags):
        raise UserError(f"{path}: {len(images)} images for {len(flags)} pairs; a pair has 2 images")
    for position, image in enumerate(images):
        if not isinstance(image, bytes):
            raise UserError(f"{path}: image {position} is {type(image).__name__}, not encoded bytes")
    # protocol 4 is what insightface's own tools read on every Python 3
    data = pickle.dumps((list(images), flags), protocol=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(path, data)
    sidecar = {"pairs": len(flags), "positive": sum(flags), "sha256": hashlib.sha256(data).hexdigest(), **(about or {})}
    atomic.write_json(_sidecar(path), sidecar, indent=1)


def check_folds(issame: np.ndarray, path: str | Path) -> None:
    """Refuses sets that are visibly incomplete or out of order.

    Every such set has ten equal folds with the same number of positive pairs each, or all positives first. A missing fold or shuffled pairs
    break that.

    Raises:
        UserError: naming the count that is wrong.
    """
    pairs = len(issame)
    known = KNOWN_PAIRS.get(Path(path).stem.lower())
    if known is not None:
        if pairs != known:
            raise UserError(
                f"{path} holds {pairs} pairs, the published set has {known}; copy it again, or rename it if it is another set"
            )
        return
    if pairs == 0 or pairs % FOLDS:
        raise UserError(
            f"{path} holds {pairs} pairs, not a multiple of {FOLDS} folds; pairs are missing, or rebuild it with tools/build_bin.py"
        )
    if issame.all() or not issame.any():
        raise UserError(f"{path} has only {'positive' if issame.all() else 'negative'} pairs; verification needs both")
    sorted_by_label = np.count_nonzero(issame[1:] != issame[:-1]) == 1
    positives = issame.reshape(FOLDS, -1).sum(1)
    if not sorted_by_label and len(set(positives.tolist())) > 1:
        raise UserError(
            f"{path}: the ten folds hold {positives.tolist()} positive pairs, they should be equal; a fold is missing or pairs were shuffled "
            "(tools/build_bin.py --balance-folds writes equal folds)"
        )


def balanced_order(issame: np.ndarray) -> np.ndarray:
    """An order of the pairs, int64 [P]: ten folds with equally many positive pairs, positives first in each, as in LFW.

    Raises:
        UserError: the number of positive or of negative pairs is not a multiple of ten.
    """
    positive, negative = np.flatnonzero(issame), np.flatnonzero(~np.asarray(issame, dtype=bool))
    for kind, pairs in (("positive", positive), ("negative", negative)):
        if len(pairs) == 0 or len(pairs) % FOLDS:
            raise UserError(
                f"{len(pairs)} {kind} pairs cannot be shared out over {FOLDS} equal folds; leave {len(pairs) % FOLDS} out"
            )
    return np.concatenate([positive.reshape(FOLDS, -1), negative.reshape(FOLDS, -1)], axis=1).ravel()


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def read_sidecar(path: str | Path) -> dict[str, Any]:
    """The sidecar that `write_bin` wrote beside a set; empty without one.

    Raises:
        UserError: it is not JSON.
    """
    sidecar = _sidecar(Path(path))
    if not sidecar.is_file():
        return {}
    try:
        said = parse_json(sidecar.read_text())
    except ValueError as error:
        raise UserError(f"{sidecar} is not JSON; remove it or write the set again") from error
    if not isinstance(said, dict):
        raise UserError(f"{sidecar} is not a JSON object; remove it or write the set again")
    return said


def _check_sidecar(path: Path, data: bytes, pairs: int) -> None:
    if not _sidecar(path).is_file():
        return
    said = read_sidecar(path)
    if said.get("pairs") != pairs or said.get("sha256") != hashlib.sha256(data).hexdigest():
        raise UserError(
            f"{path} is not the file that {_sidecar(path).name} describes ({said.get('pairs')} pairs there, {pairs} here); copy both again"
        )


def _plain(content: Any, path: Path) -> tuple[list[bytes], np.ndarray]:
    if not isinstance(content, (tuple, list)) or len(content) != 2:
        raise UserError(f"{path} is a pickle, but not of (images, issame)")
    bins, issame = content
    if isinstance(issame, PlainArray):
        try:
            issame = issame.values().tolist()
        except ValueError as error:
            raise UserError(f"{path}: issame is damaged ({error}); copy it again") from error
    if not isinstance(bins, (list, tuple)) or not isinstance(issame, (list, tuple)):
        raise UserError(f"{path} is a pickle, but not of (images, issame)")
    if len(bins) != 2 * len(issame):
        raise UserError(
            f"{path} holds {len(bins)} images for {len(issame)} pairs; a pair has 2 images, so the file is damaged"
        )
    images = []
    for position, image in enumerate(bins):
        if isinstance(image, PlainArray):
            image = image.raw
        if not isinstance(image, (bytes, bytearray)):
            raise UserError(f"{path}: image {position} is {type(image).__name__}, not encoded bytes")
        images.append(bytes(image))
    if not all(isinstance(flag, int) and flag in (0, 1) for flag in issame):
        raise UserError(f"{path}: issame must hold booleans only")
    return images, np.asarray(issame, dtype=bool)
