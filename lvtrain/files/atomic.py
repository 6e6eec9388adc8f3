"""The one writer of small files that a later start reads: a kill, a full disk or a power cut leaves the old content or the new, never half of it.

Written beside, synced, renamed, and the folder synced. A file system that fails for a moment is tried again (`patience`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import IO, Any

from lvtrain.files.patience import patiently


def write_bytes(path: Path, data: bytes, *, writer: str = "") -> None:
    """Replaces `path`. Where several processes may write it at once, each gives a `writer` of its own.

    Raises:
        OSError: it could not be written; what was there before still is.
    """
    beside = path.with_name(f".{path.name}{'.' if writer else ''}{writer}.new")

    def replace() -> None:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)

    try:
        patiently(replace)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise type(error)(error.errno, error.strerror, str(path)) from error


def write_text(path: Path, text: str, *, writer: str = "") -> None:
    """`write_bytes` of a text."""
    write_bytes(path, text.encode(), writer=writer)


def write_json(path: Path, value: Any, *, indent: int | None = None, writer: str = "") -> None:
    """`write_text` of a value as JSON, with a newline at its end."""
    write_text(path, json.dumps(value, indent=indent) + "\n", writer=writer)


def clear(folder: Path) -> None:
    """Removes what writers that were killed left beside the files of a folder. Nobody may be writing there."""
    for name in patiently(os.listdir, folder):
        if name.startswith(".") and name.endswith(".new"):
            with contextlib.suppress(OSError):
                (folder / name).unlink()


def commit(file: IO[Any], path: Path) -> None:
    """Gives a file that was written beside, too large to hold in memory, its final name; closes it."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(file.name, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes names created or renamed in a folder survive a power cut, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(handle)
