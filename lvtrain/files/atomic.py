"""The one writer of small files that a later start reads.

After a kill, a full disk or a power cut the file holds the old content or the new, never half of it. It is written under
another name, flushed to disk and renamed, and then its folder is flushed. A file system that fails for a moment is tried
again (`patience`).
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
    """Replaces the content of `path`. Processes that may write it at the same time each pass another `writer`.

    Raises:
        OSError: it could not be written. The old content is still there.
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
    """Writes a text; otherwise like `write_bytes`."""
    write_bytes(path, text.encode(), writer=writer)


def write_json(path: Path, value: Any, *, indent: int | None = None, writer: str = "") -> None:
    """Writes a value as JSON, with a newline at its end; otherwise like `write_bytes`."""
    write_text(path, json.dumps(value, indent=indent) + "\n", writer=writer)


def clear(folder: Path) -> None:
    """Removes the temporary files that killed writers left in a folder. Nobody may be writing there."""
    for name in patiently(os.listdir, folder):
        if name.startswith(".") and name.endswith(".new"):
            with contextlib.suppress(OSError):
                (folder / name).unlink()


def commit(file: IO[Any], path: Path) -> None:
    """Closes a file that was written under a temporary name, and renames it to `path`. For files too large for memory."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(file.name, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flushes a folder to disk, so that new and renamed files survive a power cut, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(handle)
