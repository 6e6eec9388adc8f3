"""Reading that is never silently less: of a file's bytes, and of what a folder holds.

`glob`, `rglob` and `os.walk` take a folder that cannot be read for an empty one, and one `pread` may return less than was asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lvtrain.files.patience import patiently


def pread(handle: int, length: int, offset: int) -> bytes:
    """`length` bytes at `offset`; fewer only where the file ends.

    Raises:
        OSError: the read failed; nothing is tried again here.
    """
    data = os.pread(handle, length, offset)
    if len(data) == length:
        return data
    parts = [data]
    while data and length > (there := sum(map(len, parts))):
        parts.append(data := os.pread(handle, length - there, offset + there))
    return b"".join(parts)


def walk(folder: str | Path, *, key: Callable[[str], Any] = str) -> Iterator[tuple[str, list[str]]]:
    """A folder and the names of its files, then the same of each folder below, in the order of `key`. Links to folders are not followed.

    Raises:
        OSError: a folder cannot be read.
    """

    def look() -> tuple[list[str], list[str]]:
        files, folders = [], []
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.is_dir():
                    files.append(entry.name)
                elif not entry.is_symlink():
                    folders.append(entry.name)
        return sorted(files, key=key), sorted(folders, key=key)

    files, folders = patiently(look)
    yield str(folder), files
    for name in folders:
        yield from walk(os.path.join(folder, name), key=key)


def find(folder: Path, suffix: str) -> list[Path]:
    """All files below `folder` whose name ends with `suffix`.

    Raises:
        OSError: a folder cannot be read.
    """
    return [Path(place, name) for place, names in walk(folder) for name in names if name.endswith(suffix)]
