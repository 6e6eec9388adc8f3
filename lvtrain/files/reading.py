"""Reading that never returns less than there is without an error: bytes of a file, and files in a folder.

`glob`, `rglob` and `os.walk` take a folder that cannot be read for an empty one. One `pread` may return fewer bytes than
were asked for.
"""

from __future__ import annotations

import os
from pathlib import Path


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


def find(folder: Path, suffix: str) -> list[Path]:
    """All files below `folder` whose name ends with `suffix`.

    Raises:
        OSError: a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    places = os.walk(folder, onerror=fail)
    return [Path(place, name) for place, _, names in places for name in names if name.endswith(suffix)]
