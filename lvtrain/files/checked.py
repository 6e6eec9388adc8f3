"""Reading files that may hold anything.

Only regular files are read, and never more bytes than a limit, which is checked before memory is allocated. What another
library raises on a damaged file becomes one line that names the file (`reading`).
"""

from __future__ import annotations

import contextlib
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path

from lvtrain.errors import UserError

_LFS = b"version https://git-lfs"


def check_regular(path: Path) -> int:
    """The size in bytes of a regular file.

    Raises:
        UserError: it is missing, empty, a folder, pipe, socket or device, or a git-LFS pointer.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; correct the path") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is not a regular file; give a file, not a folder, pipe or device")
    if not found.st_size:
        raise UserError(f"{path} is empty; copy it again")
    if found.st_size < 1024:
        with open(path, "rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise UserError(f"{path} is a git-LFS pointer, not the file itself; run git lfs pull")
    return found.st_size


def check_length(length: int, limit: int, where: str) -> None:
    """Refuses to read more than `limit` bytes.

    Raises:
        UserError: `length` is larger.
    """
    if length > limit:
        raise UserError(f"{where} announces {length:,} bytes; at most {limit:,} are read")


def inflate(data: bytes, limit: int, where: str) -> bytes:
    """Raw deflate data, unpacked to at most `limit` bytes.

    Raises:
        UserError: they are more, damaged, or cut short.
    """
    engine = zlib.decompressobj(wbits=-15)
    try:
        out = engine.decompress(data, limit + 1)
    except zlib.error as error:
        raise UserError(f"{where} is damaged ({error}); copy it again") from None
    check_length(len(out), limit, where)
    if not engine.eof:
        raise UserError(f"{where} is cut short; copy it again")
    return out


@contextlib.contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turns what a library raises on a file's content into one line. A disk that fails remains an OSError.

    Raises:
        UserError: the content is damaged, or is not of the kind `kind`.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{path} cannot be read as {kind} ({why}); it was cut short, or is not {kind}") from error
