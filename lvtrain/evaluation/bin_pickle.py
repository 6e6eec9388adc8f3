"""Loads the pickle of a verification set without running code of it.

A pickle can run any code. So the few names that such files contain are replaced by classes of this file that do nothing, and
any other name is refused.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

_LARGEST_STRING = 1 << 24  # bytes; an encoded face has some thousands
_FREE_PLACES = 1024  # places of the pickle's memo that may stay empty (Python 2 counts from 1)


class Refused(pickle.UnpicklingError):
    """The pickle asks for something outside the format; the text says for what."""


def load(data: bytes) -> Any:
    """The content of a pickle of plain values; arrays are `PlainArray`.

    Raises:
        Refused: it asks for anything else, or would take far more memory than its size.
        Exception: of any kind, where it is damaged.
    """
    _check_sizes(data)
    return _Unpickler(data).load()


def _check_sizes(data: bytes) -> None:
    """Refuses, before it is loaded, a pickle that would take far more memory than its size.

    Two ways are known. A place in the memo makes the unpickler reserve all places below it, so 9 bytes can ask for gigabytes. And one
    string in the memo can be converted many times.
    """
    places = converted = longest = 0
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            if argument is None or int(argument) > places + _FREE_PLACES:
                raise Refused(f"the place {argument} of its memo after {places} others")
            places = max(places, int(argument) + 1)
        elif opcode.name == "MEMOIZE":
            places += 1
        elif isinstance(argument, (str, bytes)):
            longest = max(longest, len(argument))
        elif opcode.name in ("REDUCE", "BUILD"):
            converted += 1
    if longest > _LARGEST_STRING and longest * converted > 16 * len(data):
        raise Refused(f"one string of {longest:,} bytes and {converted:,} conversions")


class _Dtype:
    """Replaces `numpy.dtype(name, ...)`; takes one-byte unsigned integers, booleans, and integers of scalars."""

    __slots__ = ("name",)

    def __init__(self, name: Any, *_: Any) -> None:
        text = name.decode("latin1") if isinstance(name, bytes) else name
        if text not in ("u1", "b1", "bool", "uint8", "i8", "i4", "|u1", "|b1"):
            raise Refused(f"an array of type {text!r}")
        self.name = {"b1": "|b1", "bool": "|b1", "u1": "|u1", "uint8": "|u1"}.get(text, text)

    def __setstate__(self, state: Any) -> None:
        # byte order, sub-arrays and field names: irrelevant for what is allowed, except big-endian integers
        if isinstance(state, tuple) and len(state) > 1 and state[1] in (">", b">"):
            raise Refused("a big-endian array")


class PlainArray:
    """Stands in for an array: raw bytes and a type."""

    __slots__ = ("dtype", "raw")

    def __init__(self) -> None:
        self.raw: bytes = b""
        self.dtype: _Dtype | None = None

    def __setstate__(self, state: Any) -> None:
        _, _, dtype, _, raw = state
        if isinstance(raw, str):
            raw = raw.encode("latin1")
        if not isinstance(dtype, _Dtype) or not isinstance(raw, (bytes, bytearray)):
            raise Refused("an array of objects")
        self.dtype, self.raw = dtype, bytes(raw)

    def values(self) -> np.ndarray:
        """The numbers, 1-d.

        Raises:
            ValueError: no content, or a length that does not fit the type.
        """
        if self.dtype is None:
            raise ValueError("array without content")
        return np.frombuffer(self.raw, dtype=self.dtype.name)


class _Name:
    """A callable that the pickle may call; nothing can be set on it."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setstate__(self, state: Any) -> NoReturn:
        raise Refused("changing a function")


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", b"latin1") or not isinstance(text, str):
        raise Refused(f"the codec {encoding!r}")
    return text.encode("latin1")


def _from_buffer(raw: Any, dtype: Any, *_: Any) -> PlainArray:
    array = PlainArray()
    array.__setstate__((1, None, dtype, False, raw))
    return array


def _scalar(dtype: Any, raw: Any) -> int:
    return int(_from_buffer(raw, dtype).values()[0])


def _array_type(*_: Any) -> NoReturn:
    raise Refused("numpy.ndarray called directly")


_NAMES: dict[tuple[str, str], Callable[..., Any]] = {
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): _array_type,
    ("numpy", "dtype"): _Dtype,
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _NAMES[(_module, "_reconstruct")] = lambda *_: PlainArray()
    _NAMES[(_module, "scalar")] = _scalar
for _module in ("numpy.core.numeric", "numpy._core.numeric"):
    _NAMES[(_module, "_frombuffer")] = _from_buffer


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        # "bytes": Python 2 wrote its images as strings, which must not be decoded as text
        super().__init__(io.BytesIO(data), encoding="bytes")

    def find_class(self, module: str, name: str) -> Any:
        function = _NAMES.get((module, name))
        if function is None:
            raise Refused(f"{module}.{name}")
        return _Name(function)

    def persistent_load(self, pid: Any) -> NoReturn:
        raise Refused("a persistent object")
