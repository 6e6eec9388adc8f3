"""Checks a dataset folder against its `dataset.json`. Every fault is listed.

The fast mode takes seconds and reads no image. It checks the manifest, the label map, the index (with its sha256; 850 MB
for 42 million samples) and the sizes of the shards.

The full mode reads everything. It checks the sha256 of each shard, tar headers and labels against the index, and decodes
every image.
"""

from __future__ import annotations

import functools
import hashlib
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lvtrain.data.images import ImageError, open_image
from lvtrain.data.index import Manifest, file_sha256, open_index, read_manifest
from lvtrain.datasets.parallel import ordered_map
from lvtrain.errors import UserError
from lvtrain.files.reading import parse_json

Progress = Callable[[str, int, int], None]
_CHUNK = 1 << 20
_NAMED = 20  # faults of one kind that are listed for each shard; the rest are counted


@dataclass(frozen=True)
class Fault:
    """One fault. `kind` is one word for scripts, `where` a file (and sample), `what` a sentence."""

    kind: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.what}"


@dataclass
class Verdict:
    """The result of a check. With `faults` the dataset cannot be used; `notes` are only information."""

    samples: int = 0
    identities: int = 0
    shards: int = 0
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, kind: str, where: object, what: str) -> None:
        """Adds a fault."""
        self.faults.append(Fault(kind, str(where), what))


def verify(folder: str | Path, *, full: bool = False, workers: int = 1, progress: Progress | None = None) -> Verdict:
    """Checks a dataset folder. Faults are collected, not raised.

    Args:
        folder: of the dataset.
        full: read every byte and decode every image.
        workers: processes of the full mode.
        progress: called with (stage, done, total).
    """
    folder = Path(folder)
    verdict = Verdict()
    tell = progress or (lambda stage, done, total: None)
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        path = str(folder / "dataset.json")
        verdict.add("manifest", path, str(error).removeprefix(f"{path} ").removeprefix(f"{folder} "))
        return verdict
    verdict.samples, verdict.identities, verdict.shards = manifest.samples, manifest.num_classes, len(manifest.shards)
    _check_manifest(folder, manifest, verdict)
    _check_label_map(folder, manifest, verdict)
    present = _check_sizes(folder, manifest, verdict)
    index_fits = _check_index(folder, manifest, verdict)
    _look_around(folder, manifest, verdict)
    if full:
        bounds = np.concatenate([[0], np.cumsum([shard.samples for shard in manifest.shards])])
        check = functools.partial(check_shard, folder=folder, manifest=manifest, use_index=index_fits)
        done = 0
        tell("reading", 0, manifest.samples)
        for number, faults in zip(present, ordered_map(check, [(n, int(bounds[n])) for n in present], workers=workers)):
            verdict.faults += faults
            done += manifest.shards[number].samples
            tell("reading", done, manifest.samples)
    return verdict


def _check_manifest(folder: Path, manifest: Manifest, verdict: Verdict) -> None:
    path = folder / "dataset.json"
    if parse_json(path.read_text()).get("fingerprint") != manifest.fingerprint:
        verdict.add(
            "manifest",
            path,
            "the fingerprint does not belong to its shard list; it was edited, or packed by another version",
        )
    counted = sum(shard.samples for shard in manifest.shards)
    if counted != manifest.samples:
        verdict.add("manifest", path, f"counts {manifest.samples} samples, its shards hold {counted}")


def _check_label_map(folder: Path, manifest: Manifest, verdict: Verdict) -> None:
    path = folder / "labels.txt"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        verdict.add("label-map", path, "missing; restore it: without it the labels have no names")
        return
    if hashlib.sha256(data).hexdigest() != manifest.labels_sha256:
        lines = data.count(b"\n")
        verdict.add("label-map", path, f"is not the one packed ({lines} names for {manifest.num_classes} identities)")


def _check_sizes(folder: Path, manifest: Manifest, verdict: Verdict) -> list[int]:
    """Numbers of the shards that exist."""
    present = []
    for number, shard in enumerate(manifest.shards):
        path = folder / shard.name
        if not path.is_file():
            verdict.add("missing-shard", path, f"missing, with {shard.samples} samples; restore it or pack again")
            continue
        present.append(number)
        size = path.stat().st_size
        if size < shard.size:
            verdict.add("cut-shard", path, f"ends after {size} of {shard.size} bytes; copy it again")
        elif size > shard.size:
            verdict.add("changed-shard", path, f"has {size} bytes, {shard.size} were packed; copy it again")
    return present


def _check_index(folder: Path, manifest: Manifest, verdict: Verdict) -> bool:
    """Checks the index. Returns False if it cannot be used."""
    path = str(folder / "index.bin")
    try:
        index = open_index(folder, manifest)
    except UserError as error:
        verdict.add("stale-index", path, str(error).removeprefix(f"{path} "))
        return False
    digest, seen = hashlib.sha256(), np.zeros(manifest.num_classes, dtype=bool)
    sizes = np.array([shard.size for shard in manifest.shards], dtype=np.uint64)
    bounds = np.cumsum([shard.samples for shard in manifest.shards])
    for start in range(0, len(index), _CHUNK):
        part = np.asarray(index[start : start + _CHUNK])
        digest.update(part.tobytes())
        expected = np.searchsorted(bounds, np.arange(start, start + len(part)), side="right")
        problems = (
            ("bad-label", part["label"] >= manifest.num_classes, "has a label beyond the last identity"),
            ("stale-index", part["shard"] != expected, "lies in another shard than dataset.json says"),
            (
                "stale-index",
                part["offset"] + part["length"] > sizes[np.minimum(part["shard"], len(sizes) - 1)],
                "ends beyond its shard",
            ),
        )
        for kind, wrong, what in problems:
            for sample in np.flatnonzero(wrong)[:_NAMED].tolist():
                verdict.add(kind, f"{path} sample {start + sample}", f"{what} (label {part['label'][sample]})")
        seen[part["label"][part["label"] < manifest.num_classes]] = True
    if digest.hexdigest() != manifest.index_sha256:
        verdict.add(
            "stale-index", path, "its sha256 is not the one in dataset.json; it was changed, or is of another pack"
        )
    if not seen.all():
        verdict.notes.append(
            f"{int((~seen).sum())} of {manifest.num_classes} identities have no image (first: label {int(np.argmin(seen))})"
        )
    return True


def _look_around(folder: Path, manifest: Manifest, verdict: Verdict) -> None:
    known = {shard.name for shard in manifest.shards}
    for path in sorted((folder / "shards").glob("*")) if (folder / "shards").is_dir() else []:
        if f"shards/{path.name}" not in known:
            verdict.notes.append(f"{path} is not in dataset.json; training does not read it")
    if (folder / ".pack").exists():
        verdict.notes.append(
            f"{folder / '.pack'} is left from a pack that did not end; run tools/pack_dataset.py again"
        )


def check_shard(task: tuple[int, int], *, folder: Path, manifest: Manifest, use_index: bool) -> list[Fault]:
    """Checks every byte of one shard. `task` is its number and the id of its first sample."""
    number, first = task
    shard = manifest.shards[number]
    path = folder / shard.name
    faults: list[Fault] = []
    try:
        digest = file_sha256(path)
    except OSError as error:
        return [Fault("unreadable-shard", str(path), f"{error.strerror or error}; check the disk, or copy it again")]
    if digest != shard.sha256:
        faults.append(
            Fault(
                "changed-shard", str(path), "its sha256 is not the one in dataset.json; bytes were flipped or replaced"
            )
        )
    records = np.asarray(open_index(folder, manifest)[first : first + shard.samples]) if use_index else None
    counts: dict[str, int] = {}

    def note(kind: str, where: str, what: str) -> None:
        counts[kind] = counts.get(kind, 0) + 1
        if counts[kind] <= _NAMED:
            faults.append(Fault(kind, where, what))

    sample = 0
    label: tuple[str, str] | None = None
    image: tuple[str, int, int, bytes] | None = None
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                body = tar.extractfile(member)
                data = body.read() if body else b""
                key, _, suffix = member.name.partition(".")
                if suffix == "jpg":
                    image = (key, member.offset_data, member.size, data)
                elif suffix == "cls":
                    label = (key, data.decode(errors="replace").strip())
                if image and label:
                    where = f"{path} sample {first + sample} ({image[0]})"
                    if image[0] != label[0]:
                        note("damaged-tar", where, f"is followed by the label of {label[0]}")
                    if records is not None and sample < len(records):
                        _compare(records[sample], image, label[1], where, note)
                    problem = _undecodable(image[3], manifest.image_size)
                    if problem:
                        note("bad-image", where, problem)
                    sample, image, label = sample + 1, None, None
    except (tarfile.TarError, OSError, EOFError) as error:
        note("damaged-tar", str(path), f"cannot be read behind sample {first + sample} ({error})")
    if sample != shard.samples:
        note("damaged-tar", str(path), f"{sample} samples can be read, dataset.json counts {shard.samples}")
    for kind, count in counts.items():
        if count > _NAMED:
            faults.append(Fault(kind, str(path), f"and {count - _NAMED} more"))
    return faults


def _compare(
    record: np.void, image: tuple[str, int, int, bytes], label: str, where: str, note: Callable[[str, str, str], None]
) -> None:
    if (int(record["offset"]), int(record["length"])) != image[1:3]:
        note(
            "stale-index",
            where,
            f"lies at {image[1]}+{image[2]} in the tar, at {record['offset']}+{record['length']} in the index",
        )
    if label != str(record["label"]):
        note("swapped-label", where, f"has label {label} in the tar and {record['label']} in the index")


def _undecodable(data: bytes, size: tuple[int, int] | None) -> str | None:
    try:
        picture = open_image(data, upright=False)
    except ImageError as error:
        return f"cannot be decoded: {error}"
    if size is not None and picture.size != (size[1], size[0]):
        return f"is {picture.width}x{picture.height}, dataset.json says {size[1]}x{size[0]}"
    return None
