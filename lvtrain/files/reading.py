"""Reading that never returns less than there is without an error: bytes of a file, files in a folder, JSON.

`glob`, `rglob` and `os.walk` take a folder that cannot be read for an empty one. One `pread` may return fewer bytes than
were asked for.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def pread(handle: int, length: int, offset: int) -> bytes:
    """`length` bytes at `offset`; fewer only where the file ends.

    Raises:
        OSError: the read failed. It is not tried again here.
    """
    data = os.pread(handle, length, offset)
    if len(data) == length:
        return data
    parts = [data]
    while data and length > (there := sum(map(len, parts))):
        parts.append(data := os.pread(handle, length - there, offset + there))
    return b"".join(parts)


def parse_json(text: str | bytes, **hooks: Any) -> Any:
    """The value of a JSON document that may hold anything. `hooks` are keywords of `json.loads`.

    Raises:
        ValueError: not JSON, nested too deep, or a number that no float can hold (`1e999`, which int() refuses later).
    """
    try:
        return json.loads(text, parse_float=_finite, **hooks)
    except RecursionError:
        raise ValueError("its values are nested too deep") from None


def read_records(path: Path, key: str, kind: type) -> tuple[list[dict[str, Any]], int]:
    """The rows of a .jsonl file: JSON objects whose `key` is of `kind`. No file has no rows.

    A crash may have cut a line, and a disk may have damaged one: such lines are left out.

    Returns:
        The rows, and the number of lines left out.

    Raises:
        OSError: the file cannot be read.
    """
    rows, dropped = [], 0
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and type(row.get(key)) is kind:
            rows.append(row)
        else:
            dropped += bool(line.strip())
    return rows, dropped


def read_lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8, with or without byte order mark, that end with LF or CR LF and with nothing else.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
        OSError: it cannot be read.
    """
    return [line.removesuffix("\r") for line in path.read_bytes().decode("utf-8-sig").split("\n")]


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text} is too large")
    return number


def find(folder: Path, suffix: str) -> list[Path]:
    """All files below `folder` whose name ends with `suffix`.

    Raises:
        OSError: a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    places = os.walk(folder, onerror=fail)
    return [Path(place, name) for place, _, names in places for name in names if name.endswith(suffix)]
