"""insightface's verification sets (`lfw.bin`, `cfp_fp.bin`, ...): a reader that runs no code of the file, a writer, and checks.

A `.bin` file is a pickle of `(images, issame)`: `2 P` encoded images (bytes, or the uint8 array that OpenCV's encoder returns) and P booleans.
The pairs form ten consecutive folds; the order is part of the benchmark. A pickle can run any code, so this reader replaces the few names
that such files contain by classes of this file that do nothing, and refuses any other name.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import pickletools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from lvtrain.errors import UserError
from lvtrain.files import atomic
from lvtrain.files.checked import check_regular

FOLDS = 10
_LARGEST_STRING = 1 << 24  # bytes; an encoded face has some thousands
_FREE_PLACES = 1024  # places of the pickle's memo that may stay empty (Python 2 counts from 1)
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
        _check_sizes(data)
        content = _Unpickler(data).load()
    except _Refused as error:
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
        said = json.loads(sidecar.read_text())
    except ValueError as error:
        raise UserError(f"{sidecar} is not JSON; remove it or write the set again") from error
    if not isinstance(said, dict):
        raise UserError(f"{sidecar} is not a JSON object; remove it or write the set again")
    return said


def _check_sidecar(path: Path, data: bytes, pairs: int) -> None:
    sidecar = _sidecar(path)
    if not sidecar.is_file():
        return
    said = read_sidecar(path)
    if said.get("pairs") != pairs or said.get("sha256") != hashlib.sha256(data).hexdigest():
        raise UserError(
            f"{path} is not the file that {sidecar.name} describes ({said.get('pairs')} pairs there, {pairs} here); copy both again"
        )


# ------------------------------------------------------------------------------------------------------ the unpickler that runs nothing


class _Refused(pickle.UnpicklingError):
    pass


def _check_sizes(data: bytes) -> None:
    """Refuses, before it is loaded, a pickle that would take far more memory than its size.

    Two ways are known. A place in the memo makes the unpickler reserve all places below it, so 9 bytes can ask for gigabytes. And one
    string in the memo can be converted many times.
    """
    places = converted = longest = 0
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            if argument is None or int(argument) > places + _FREE_PLACES:
                raise _Refused(f"the place {argument} of its memo after {places} others")
            places = max(places, int(argument) + 1)
        elif opcode.name == "MEMOIZE":
            places += 1
        elif isinstance(argument, (str, bytes)):
            longest = max(longest, len(argument))
        elif opcode.name in ("REDUCE", "BUILD"):
            converted += 1
    if longest > _LARGEST_STRING and longest * converted > 16 * len(data):
        raise _Refused(f"one string of {longest:,} bytes and {converted:,} conversions")


class _Dtype:
    """Replaces `numpy.dtype(name, ...)`; takes one-byte unsigned integers, booleans, and integers of scalars."""

    __slots__ = ("name",)

    def __init__(self, name: Any, *_: Any) -> None:
        text = name.decode("latin1") if isinstance(name, bytes) else name
        if text not in ("u1", "b1", "bool", "uint8", "i8", "i4", "|u1", "|b1"):
            raise _Refused(f"an array of type {text!r}")
        self.name = {"b1": "|b1", "bool": "|b1", "u1": "|u1", "uint8": "|u1"}.get(text, text)

    def __setstate__(self, state: Any) -> None:
        # byte order, sub-arrays and field names: irrelevant for what is allowed, except big-endian integers
        if isinstance(state, tuple) and len(state) > 1 and state[1] in (">", b">"):
            raise _Refused("a big-endian array")


class _Array:
    """Replaces an array: raw bytes and a type."""

    __slots__ = ("dtype", "raw")

    def __init__(self) -> None:
        self.raw: bytes = b""
        self.dtype: _Dtype | None = None

    def __setstate__(self, state: Any) -> None:
        _, _, dtype, _, raw = state
        if isinstance(raw, str):
            raw = raw.encode("latin1")
        if not isinstance(dtype, _Dtype) or not isinstance(raw, (bytes, bytearray)):
            raise _Refused("an array of objects")
        self.dtype, self.raw = dtype, bytes(raw)

    def values(self) -> np.ndarray:
        if self.dtype is None:
            raise ValueError("array without content")
        return np.frombuffer(self.raw, dtype=self.dtype.name)  # ValueError where the length does not fit the type


class _Name:
    """A callable that the pickle may call; nothing can be set on it."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setstate__(self, state: Any) -> NoReturn:
        raise _Refused("changing a function")


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", b"latin1") or not isinstance(text, str):
        raise _Refused(f"the codec {encoding!r}")
    return text.encode("latin1")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _from_buffer(raw: Any, dtype: Any, *_: Any) -> _Array:
    array = _Array()
    array.__setstate__((1, None, dtype, False, raw))
    return array


def _scalar(dtype: Any, raw: Any) -> int:
    array = _from_buffer(raw, dtype)
    return int(array.values()[0])


def _array_type(*_: Any) -> NoReturn:
    raise _Refused("numpy.ndarray called directly")


_NAMES: dict[tuple[str, str], Callable[..., Any]] = {
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): _array_type,
    ("numpy", "dtype"): _Dtype,
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _NAMES[(_module, "_reconstruct")] = _reconstruct
    _NAMES[(_module, "scalar")] = _scalar
for _module in ("numpy.core.numeric", "numpy._core.numeric"):
    _NAMES[(_module, "_frombuffer")] = _from_buffer


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        import io

        # "bytes": Python 2 wrote its images as strings, which must not be decoded as text
        super().__init__(io.BytesIO(data), encoding="bytes")

    def find_class(self, module: str, name: str) -> Any:
        function = _NAMES.get((module, name))
        if function is None:
            raise _Refused(f"{module}.{name}")
        return _Name(function)

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _Refused("a persistent object")


def _plain(content: Any, path: Path) -> tuple[list[bytes], np.ndarray]:
    if not isinstance(content, (tuple, list)) or len(content) != 2:
        raise UserError(f"{path} is a pickle, but not of (images, issame)")
    bins, issame = content
    if isinstance(issame, _Array):
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
        if isinstance(image, _Array):
            image = image.raw
        if not isinstance(image, (bytes, bytearray)):
            raise UserError(f"{path}: image {position} is {type(image).__name__}, not encoded bytes")
        images.append(bytes(image))
    if not all(isinstance(flag, int) and flag in (0, 1) for flag in issame):
        raise UserError(f"{path}: issame must hold booleans only")
    return images, np.asarray(issame, dtype=bool)
