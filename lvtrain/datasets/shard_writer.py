"""Writes one WebDataset shard: `key.jpg` and `key.cls` for each sample.

The shard has a temporary name until it is complete. Its bytes depend on the samples only, not on clock, owner or umask.
So the same input gives the same sha256 on every machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from lvtrain.errors import UserError
from lvtrain.files.atomic import commit


@dataclass
class WrittenShard:
    """A finished tar: its size in bytes and sha256, and for each sample the image's offset and length, and its label."""

    name: str
    size: int
    sha256: str
    offsets: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


class _HashingFile:
    """Counts and hashes what tarfile writes, so that the shard need not be read again."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.position = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.position += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.position


class ShardWriter:
    """Writes a shard: `with ShardWriter(folder, "shards/000000.tar") as shard: shard.add(key, jpeg, label)`.

    When the block ends, the temporary file gets its final name, and `shard.written` describes it. An exception removes it.
    """

    def __init__(self, folder: str | Path, name: str) -> None:
        self.path = Path(folder) / name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self.path.with_name(self.path.name + ".tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115  (closed by __exit__)
        self._hashing = _HashingFile(self._file)
        self._tar = tarfile.TarFile(fileobj=self._hashing, mode="w", format=tarfile.USTAR_FORMAT)  # type: ignore[arg-type]
        self.written = WrittenShard(name, 0, "")

    def add(self, key: str, image: bytes, label: int) -> None:
        """Adds a sample.

        Args:
            key: new in this shard, at most 90 characters, without a dot (WebDataset splits names there).
            image: encoded.
            label: of its identity.

        Raises:
            UserError: the key is not possible.
        """
        if "." in key or not 0 < len(key) <= 90:
            raise UserError(f"{self.path}: {key!r} cannot be a WebDataset key; use 1 to 90 characters without a dot")
        self.written.offsets.append(self._member(f"{key}.jpg", image))
        self._member(f"{key}.cls", str(int(label)).encode())
        self.written.lengths.append(len(image))
        self.written.labels.append(int(label))

    def _member(self, name: str, data: bytes) -> int:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o644
        offset = self._hashing.position + tarfile.BLOCKSIZE
        self._tar.addfile(info, io.BytesIO(data))
        return offset

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._tar.close()
                self.written.size, self.written.sha256 = self._hashing.position, self._hashing.digest.hexdigest()
                commit(self._file, self.path)
        finally:
            with contextlib.suppress(OSError):  # on a full disk what is still buffered cannot be written
                self._file.close()
            self._temporary.unlink(missing_ok=True)
