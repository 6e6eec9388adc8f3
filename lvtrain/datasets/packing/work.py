"""The work of a pack's worker process: inspect a chunk of images, or write one shard. Each result is a file."""

from __future__ import annotations

import errno
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lvtrain.data import align
from lvtrain.datasets.catalogue import Catalogue
from lvtrain.datasets.importer import Importer, open_importer
from lvtrain.datasets.packing import images
from lvtrain.datasets.shard_writer import ShardWriter
from lvtrain.errors import UserError
from lvtrain.files.atomic import commit, write_bytes
from lvtrain.files.patience import patiently

INSPECTION_FILE = "inspection.bin"


@dataclass(frozen=True)
class Job:
    """What a worker needs. `work` is the pack's scratch folder inside `out`."""

    kind: str
    source: Path
    out: Path
    work: Path
    options: dict[str, Any]
    target: images.Target
    align: bool
    detector: str | None
    resize: bool
    widen: bool

    @property
    def inspection_dtype(self) -> np.dtype:
        return images.ALIGNED_INSPECTION if self.align else images.INSPECTION


@dataclass
class _Open:
    job: Job
    source: Importer
    catalogue: Catalogue
    detector: align.Detector | align.YuNet | None


_open: _Open | None = None


def start(job: Job, inspecting: bool) -> None:
    """Prepares a worker process."""
    global _open
    import cv2

    cv2.setNumThreads(1)
    source = open_importer(job.kind, job.source, job.options)
    _open = _Open(
        job, source, Catalogue.open(job.work), align.open_detector(job.detector) if job.align and inspecting else None
    )


def _state() -> _Open:
    if _open is None:
        raise RuntimeError("work.start was not called in this process")
    return _open


def inspect_chunk(task: tuple[Path, int, int]) -> int:
    """Rows [start, stop) of the catalogue into one file of inspection records; returns how many."""
    path, first, stop = task
    state = _state()
    records = np.zeros(stop - first, dtype=state.job.inspection_dtype)
    for row in range(first, stop):
        try:
            data = state.source.read(state.catalogue, row)
        except images.UNREADABLE as error:
            # a failing disk or a forbidden file does not mean a damaged image, so it must not be skipped as one
            if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
                raise OSError(error.errno, error.strerror, error.filename or state.catalogue.name(row)) from None
            records[row - first]["flags"] = images.UNDECODABLE
            continue
        digest, width, height, flags, matrix = images.inspect(data, state.job.target, state.detector)
        record = records[row - first]
        record["hash"], record["width"], record["height"], record["flags"] = digest, width, height, flags
        if matrix is not None:
            record["matrix"] = matrix
    write_bytes(path, records.tobytes())
    return stop - first


def write_shard(task: tuple[int, int, int]) -> int:
    """Writes a shard. `task` is its number and its range of the final order. Returns how many images were encoded."""
    number, first, stop = task
    state = _state()
    job = state.job
    order = np.load(job.work / "order.npy", mmap_mode="r")[first:stop]
    labels = np.load(job.work / "labels.npy", mmap_mode="r")[first:stop]
    inspection = np.memmap(job.work / INSPECTION_FILE, dtype=job.inspection_dtype, mode="r")
    finished: dict[int, bytes] = {}
    encoded = 0
    for row in np.sort(order).tolist():  # in the source's order: reads are sequential, and each row group is read once
        finished[row], again = _image(state, row, inspection[row])
        encoded += again
    with ShardWriter(job.out, shard_name(number)) as shard:
        for position, (row, label) in enumerate(zip(order.tolist(), labels.tolist()), start=first):
            shard.add(f"{position:09d}-{_safe(state.catalogue.name(row))}", finished.pop(row), label)
    written = shard.written
    part = io.BytesIO()
    np.savez(
        part, offsets=np.array(written.offsets, np.uint64), lengths=np.array(written.lengths, np.uint32),
        labels=np.array(written.labels, np.uint32), size=written.size, sha256=written.sha256, encoded=encoded,
    )  # fmt: skip
    write_bytes(part_path(job.work, number), part.getvalue())
    return encoded


def save(path: Path, array: np.ndarray) -> None:
    """Like `numpy.save`, but a crash leaves no partial file."""
    with open(path.with_name(path.name + ".tmp"), "wb") as file:
        np.save(file, array)
        commit(file, path)


def shard_name(number: int) -> str:
    """Name of a shard in the dataset folder."""
    return f"shards/{number:06d}.tar"


def part_path(work: Path, number: int) -> Path:
    """Scratch file with the index entries of a written shard."""
    return work / f"part-{number:06d}.npz"


def read_part(work: Path, number: int) -> dict[str, np.ndarray]:
    """The arrays of that file. No file is left open: an error of its close would be a traceback of nobody's."""
    with np.load(io.BytesIO(patiently(part_path(work, number).read_bytes))) as found:
        return dict(found)


def _image(state: _Open, row: int, record: np.void) -> tuple[bytes, bool]:
    """The bytes for the shard, and whether they were encoded here."""
    flags, job = int(record["flags"]), state.job
    if flags & images.UNDECODABLE:  # kept because of the policy; training ignores it
        try:
            return state.source.read(state.catalogue, row), False
        except images.UNREADABLE:
            return b"", False
    resize = job.resize and bool(flags & images.WRONG_SIZE)
    widen = job.widen and bool(flags & images.NARROW)
    matrix = record["matrix"] if job.align else None
    try:
        data = state.source.read(state.catalogue, row)
        if not (resize or widen or flags & images.CONVERTED):
            return data, False
        return images.jpeg(data, job.target, resize=resize, widen=widen, matrix=matrix), True
    except images.UNREADABLE as error:
        raise UserError(
            f"{state.catalogue.name(row)} could be read before, but not now ({error}); check the disk, then start again"
        ) from None


def _safe(name: str) -> str:
    """The source's name as part of a WebDataset key: without dot and slash, at most its last 70 characters."""
    stem = os.path.splitext(name)[0]
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in stem)[-70:]
