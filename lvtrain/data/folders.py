"""The one rule for folders of images: which folders are identities, which files are their images. Packing and evaluation use it alike.

    ROOT/IDENTITY/**/IMAGE    (level 1)      ROOT/PART/IDENTITY/**/IMAGE    (level 2; an identity may lie in several parts)

Hidden folders and those that NAS boxes and archives leave (`@eaDir`, `__MACOSX`) are never identities, and nothing in them is read.
Where the folders below ROOT look like parts (`train/`, `val/`), the level must be said.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from lvtrain.data.images import is_image_name
from lvtrain.errors import UserError

SYSTEM_FOLDERS = frozenset({"@eadir", "#recycle", "#snapshot", "__macosx", "lost+found", "$recycle.bin"}) | {
    "system volume information",
    "__pycache__",
}
PARTS = frozenset({"train", "training", "val", "valid", "validation", "trainval", "test", "testing", "dev", "eval"}) | {
    "evaluation",
    "gallery",
    "probe",
    "query",
    "images",
    "data",
}
_FEW = 100  # more folders than this below ROOT are identities, not parts


class Entry(NamedTuple):
    """One finding. An identity has no `path`; an image has both; what is left out has a `reason`. Paths are relative to the root."""

    identity: str | None
    path: str | None
    reason: str | None = None


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorts id2 before id10: digits count as numbers; no two names (id1, id01) are equal, or a listing's order would decide."""
    parts = [(1, int(part), "") if part.isdecimal() else (2, 0, part) for part in re.split(r"(\d+)", name) if part]
    return [*parts, (0, 0, name)]


def is_hidden(name: str) -> bool:
    """Whether a folder of this name is not part of a dataset."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def in_hidden_folder(name: str) -> bool:
    """Whether a folder of the relative path `name` (of a file, or of an archive's member) is not part of a dataset."""
    return any(is_hidden(part) for part in os.path.dirname(name).split("/") if part not in ("", ".", ".."))


def walk_identities(
    root: Path, *, level: int | None = None, accepts: Callable[[str], bool] = lambda name: True
) -> Iterator[Entry]:
    """Every identity, image and left-out file below `root`, in natural order.

    Args:
        root: folder of the dataset.
        level: 1 or 2, how deep the identities' folders lie. None finds out: it is 1, and folders that look like parts are refused.
        accepts: which names of folders are identities; what lies in the others is left out.

    Raises:
        UserError: not a folder, or the level has to be said.
        OSError: a folder that cannot be read.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; a folder with one folder an identity is needed")
    if level is None:
        _check_level(root)
    elif level > 1:
        _check_parts(root)
    yield from _below(root, root, level or 1, accepts)


def _check_level(root: Path) -> None:
    """Raises UserError where the folders below `root` look like parts, not identities."""
    tops = [entry for entry in _entries(root) if entry.is_dir() and not is_hidden(entry.name)]
    if not tops or len(tops) > _FEW:
        return
    deep = {}  # folders inside each folder that holds no image itself
    for top in tops:
        inside = list(_entries(top.path))
        if not any(is_image_name(entry.name) for entry in inside):
            deep[top.name] = sum(entry.is_dir() and not is_hidden(entry.name) for entry in inside)
    parts = [name for name, folders in deep.items() if folders and name.lower() in PARTS]
    if len(deep) == len(tops) and sum(deep.values()) > len(tops) ** 2:  # few folders with many in each
        parts = list(deep)
    if parts:
        shown = ", ".join(f"{name}/" for name in parts[:3]) + (", …" if len(parts) > 3 else "")
        raise UserError(
            f"{root} holds {shown}, which look like parts of a dataset and not like identities; give {root / parts[0]} alone, "
            "or pack with --option level=2 (the identities lie inside these) or --option level=1 (these are the identities)"
        )


def _check_parts(root: Path) -> None:
    """Raises UserError where a folder below the parts looks like a part, too: its identities would become one."""
    for part in (entry for entry in _entries(root) if entry.is_dir() and not is_hidden(entry.name)):
        for entry in (entry for entry in _entries(part.path) if entry.is_dir() and entry.name.lower() in PARTS):
            inside = list(_entries(entry.path))
            if any(deep.is_dir() for deep in inside) and not any(is_image_name(deep.name) for deep in inside):
                raise UserError(
                    f"{entry.path} looks like a part of a dataset, but level=2 makes it an identity; give {part.path} alone"
                )


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    return sorted(os.scandir(folder), key=lambda entry: natural_key(entry.name))


def _below(root: Path, folder: str | Path, level: int, accepts: Callable[[str], bool]) -> Iterator[Entry]:
    for entry in _entries(folder):
        path = os.path.relpath(entry.path, root)
        if not entry.is_dir():
            yield Entry(None, path, "file beside the identity folders")
        elif is_hidden(entry.name):
            yield from _all_of(root, entry.path, "file in a hidden or system folder")
        elif level > 1:
            yield from _below(root, entry.path, level - 1, accepts)
        elif not accepts(entry.name):
            yield from _all_of(root, entry.path, "file in a folder whose name is not an identity")
        else:
            yield Entry(entry.name, None)
            yield from _images(root, entry.path, entry.name)


def _images(root: Path, top: str, identity: str) -> Iterator[Entry]:
    for folder, below, files in os.walk(top, onerror=_raise):
        below.sort(key=natural_key)
        for name in list(below):
            path = os.path.join(folder, name)
            if is_hidden(name):
                below.remove(name)
                yield from _all_of(root, path, "file in a hidden or system folder")
            elif os.path.islink(path):
                below.remove(name)
                yield Entry(None, os.path.relpath(path, root), "link to a folder")
        for name in sorted(files, key=natural_key):
            path = os.path.relpath(os.path.join(folder, name), root)
            if is_image_name(name):
                yield Entry(identity, path)
            else:
                yield Entry(None, path, "hidden file" if name[0] == "." else "file that is not an image by its suffix")


def _all_of(root: Path, top: str, reason: str) -> Iterator[Entry]:
    for folder, _, files in os.walk(top, onerror=_raise):
        for name in sorted(files):
            yield Entry(None, os.path.relpath(os.path.join(folder, name), root), reason)


def _raise(error: OSError) -> None:
    raise error
