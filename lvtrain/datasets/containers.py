"""Files that hold many images. They are found by suffix, opened once per process, and read by position."""

from __future__ import annotations

import os
from pathlib import Path

from lvtrain.data.folders import in_hidden_folder, natural_key
from lvtrain.data.images import MAX_BYTES
from lvtrain.datasets.catalogue import CatalogueWriter
from lvtrain.errors import UserError
from lvtrain.files.checked import check_length, check_regular
from lvtrain.files.reading import pread


class Containers:
    """The files of one suffix in a source, which is one such file or a folder of them.

    Args:
        path: the source.
        suffix: such as `.tar`. Files in hidden and system folders, links to folders, and `._*` are left out, and counted.
    """

    def __init__(self, path: Path, suffix: str) -> None:
        self.path, self.suffix = path, suffix
        self._open: dict[str, int] = {}

    def files(self, out: CatalogueWriter) -> list[Path]:
        """The files in natural order. Files that look like containers but are not read are counted in `out`.

        Raises:
            UserError: there are none, or one is empty, a pipe or a git-LFS pointer.
        """
        found = [self.path] if not self.path.is_dir() else []
        if self.path.is_dir():
            for folder, below, names in os.walk(self.path, onerror=_raise):
                for path in (Path(folder, name) for name in below):
                    if path.is_symlink():
                        out.left_out("link to a folder", str(path))
                hidden = in_hidden_folder(f"{Path(folder).relative_to(self.path)}/")
                for name in (name for name in names if self.suffix in name.lower() or name.lower().endswith(".tgz")):
                    path = Path(folder, name)
                    if hidden:
                        out.left_out(f"{self.suffix} file in a hidden or system folder", str(path))
                    elif name.startswith("."):
                        out.left_out(f"hidden {self.suffix} file", str(path))
                    elif name.lower().endswith(self.suffix):
                        found.append(path)
                    else:
                        out.left_out(f"file that is a {self.suffix} inside another format, or part of one", str(path))
        if not found:
            raise UserError(f"{self.path} holds no {self.suffix} file; check SRC and --kind")
        for file in found:
            check_regular(file)
        return sorted(found, key=lambda file: natural_key(str(file)))

    def relative(self, file: Path) -> str:
        return str(file.relative_to(self.path)) if self.path.is_dir() else file.name

    def absolute(self, name: str) -> Path:
        return self.path / name if self.path.is_dir() else self.path

    def read_at(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes at `offset` of a file.

        Raises:
            UserError: the file ends before them, or `length` is more than an image may have.
        """
        check_length(length, MAX_BYTES, f"{self.absolute(name)}: the image at byte {offset}")
        if name not in self._open:
            self._open[name] = os.open(self.absolute(name), os.O_RDONLY)
        data = pread(self._open[name], length, offset)
        if len(data) != length:
            raise UserError(
                f"{self.absolute(name)} ends at byte {offset + len(data)}, inside an image; it was cut: copy it again"
            )
        return data


def _raise(error: OSError) -> None:
    raise error
