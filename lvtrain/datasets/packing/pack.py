"""Packs any source into a dataset folder: list, inspect, decide, write.

Every stage leaves files in `OUT/.pack`. So a killed pack continues when it is started again with the same options. A shard
gets its final name when it is complete. `dataset.json` is written last and makes the folder a dataset. The result does not
depend on the number of workers.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lvtrain import randomness
from lvtrain.data import align
from lvtrain.data.index import IndexWriter, Manifest
from lvtrain.datasets import contact_sheet
from lvtrain.datasets.catalogue import LABEL_ORDERS, Catalogue, CatalogueWriter
from lvtrain.datasets.importer import IMPORTERS, check_options, open_importer
from lvtrain.datasets.packing import images, work
from lvtrain.datasets.packing.policies import Issues, Policies
from lvtrain.datasets.packing.reconcile import reconcile
from lvtrain.datasets.parallel import ordered_map
from lvtrain.errors import UserError
from lvtrain.files import atomic
from lvtrain.files.patience import patiently

Progress = Callable[[str, int, int], None]
REPORT = "pack_report.json"
FINISHED = ".pack_finished"  # the scratch folder of a finished pack, until it is removed
SHEET = "contact_sheet.png"
_LARGEST_KEPT = 1 << 26  # labels; each costs a line of labels.txt and a class centre


@dataclass(frozen=True)
class PackOptions:
    """The options that decide the bytes of the result.

    Attributes:
        kind: of the source.
        seed: of the order.
        shuffle: write the samples in random order, so that shards are not sorted by identity.
        samples_per_shard: images in one tar.
        size: pixels a side that every image must have; None = any.
        quality: of a JPEG that must be encoded (PNG, WebP, fixes, alignment). Other JPEGs are copied.
        label_order: how identity names are numbered: `natural` (id2 before id10, as CVLface) or `lexicographic` (as
            torchvision's ImageFolder).
        align: detect faces and align them.
        licence: of the images, for the manifest.
        policies: what is done about each kind of problem.
        detector: with `align`, the ONNX file of OpenCV's YuNet; None: MTCNN of the `align` extra.
        options: of the kind of source, by name; see the classes of `lvtrain/datasets/importers/`.

    Raises:
        UserError: an unknown name, or a value out of range.
    """

    kind: str
    seed: int = 0
    shuffle: bool = True
    samples_per_shard: int = 8192
    size: int | None = 112
    quality: int = 95
    label_order: str = "natural"
    align: bool = False
    detector: str | None = None
    licence: str = "unknown"
    policies: Policies = field(default_factory=Policies)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", check_options(self.kind, self.options).model_dump())
        if self.label_order not in LABEL_ORDERS:
            raise UserError(f"--label-order {self.label_order!r} is unknown; choose one of {', '.join(LABEL_ORDERS)}")
        if (
            self.samples_per_shard < 1
            or not 1 <= self.quality <= 100
            or (self.size is not None and not 16 <= self.size <= 4096)
        ):
            raise UserError("--samples-per-shard must be at least 1, --quality 1 to 100, --size 16 to 4096")


def pack(
    source: str | Path, out: str | Path, options: PackOptions, *, workers: int = 1, progress: Progress | None = None
) -> dict[str, Any]:
    """Packs a source into a dataset folder. Returns the content of `pack_report.json`.

    Args:
        source: file or folder.
        out: folder of the dataset; new, or of a pack that was killed.
        options: see `PackOptions`.
        workers: processes.
        progress: called with (stage, done, total).

    Raises:
        UserError: there is nothing to pack, or a problem whose policy is `fail`; or `out` is finished, was begun with other
            options, is in use by another pack, or cannot be written.
    """
    source, out = Path(source), Path(out)
    new = not (out / ".pack").exists()
    try:
        if (report := _ended(source, out, options)) is not None:
            return report
        scratch = _begin(source, out, options)
        with _alone(scratch):
            try:
                return _pack(source, out, scratch, options, workers, progress or (lambda stage, done, total: None))
            except UserError:
                # refused before anything was written: the corrected command starts from scratch
                if new and not any(out.glob(work.shard_name(0))):
                    shutil.rmtree(scratch)
                    if not any(out.iterdir()):
                        out.rmdir()
                raise
    except OSError as error:
        reason = f"{error.filename or out}: {error.strerror or error}"
        raise UserError(f"{reason}; fix that and start again with the same options: the pack continues") from error


def _pack(source: Path, out: Path, scratch: Path, options: PackOptions, workers: int, tell: Progress) -> dict[str, Any]:
    job = work.Job(
        options.kind, source, out, scratch, options.options, images.Target(options.size, options.quality),
        options.align, options.detector, options.policies.wrong_size == "fix", options.policies.grey == "fix",
    )  # fmt: skip
    opened = open_importer(options.kind, source, options.options)
    if options.align:
        align.open_detector(options.detector)  # raises an error now, before the listing, if it is not installed
    if not (scratch / "rows.bin").exists():
        tell("listing", 0, 0)
        writer = CatalogueWriter(scratch)
        opened.scan(writer)
        writer.close(options.label_order)
    catalogue = Catalogue.open(scratch)
    _inspect(job, len(catalogue.rows), workers, tell)
    inspection = np.memmap(scratch / work.INSPECTION_FILE, dtype=job.inspection_dtype, mode="r")
    plan = _decide(catalogue, inspection, opened.read_groups(catalogue), options)
    work.save(scratch / "order.npy", plan.order)
    work.save(scratch / "labels.npy", plan.labels[catalogue.rows["identity"][plan.order]])
    _write(job, plan.bounds, workers, tell)
    manifest, encoded = _commit(job, plan, options)
    report = _report(job, catalogue, inspection, plan, manifest, encoded, options)
    report["contact_sheet"] = _sheet(out, manifest)
    atomic.write_json(out / REPORT, report, indent=1)
    # renamed first: otherwise a later start would continue from a half-removed scratch folder
    _remove(patiently(scratch.rename, out / FINISHED))
    return report


def _remove(finished: Path) -> None:
    """Removes the scratch folder of a finished pack. Where that fails, it stays: the same command removes it."""
    with contextlib.suppress(OSError):
        patiently(shutil.rmtree, finished)


def _ended(source: Path, out: Path, options: PackOptions) -> dict[str, Any] | None:
    """The report of a pack that was killed after its end, while it removed its scratch folder. That is removed here."""
    if not (out / FINISHED).exists():
        return None
    _remove(out / FINISHED)
    packed = json.loads(patiently((out / "dataset.json").read_text)).get("provenance", {})
    is_same = json.loads(json.dumps(_provenance(source, options))) == packed
    report: dict[str, Any] | None = json.loads(patiently((out / REPORT).read_text)) if is_same else None
    return report


def _provenance(source: Path, options: PackOptions) -> dict[str, Any]:
    kept = {key: value for key, value in asdict(options).items() if key not in ("licence", "seed")}
    return {"source": source.name, **kept}


def _begin(source: Path, out: Path, options: PackOptions) -> Path:
    """The scratch folder, new or of the pack to continue."""
    if (out / "dataset.json").exists() and not (out / ".pack").exists():
        raise UserError(f"{out} is a finished dataset; choose another folder, or remove it")
    if IMPORTERS.get(options.kind).lists_folders and source.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"{out} lies inside {source}, where it would become an identity; choose a folder elsewhere")
    scratch = out / ".pack"
    wanted = json.loads(json.dumps({"source": str(source.absolute()), **asdict(options)}))
    path = scratch / "options.json"
    if path.exists():
        try:
            begun = dict(json.loads(path.read_text()))
        except ValueError:
            raise UserError(f"{path} is damaged; remove {scratch} and start again") from None
        differing = sorted(key for key in wanted.keys() | begun.keys() if wanted.get(key) != begun.get(key))
        if differing:
            raise UserError(
                f"{out} holds a pack begun with other options ({', '.join(differing)}); give the same, or remove {scratch}"
            )
    else:
        scratch.mkdir(parents=True, exist_ok=True)
        atomic.write_json(path, wanted)
    return scratch


@contextlib.contextmanager
def _alone(scratch: Path) -> Iterator[None]:
    """Locks the folder: two packs in it would overwrite each other. The lock ends with the process."""
    with open(scratch / "lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another pack is writing {scratch.parent}; wait for it, or choose another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def _inspect(job: work.Job, count: int, workers: int, tell: Progress) -> None:
    """Reads and decodes every image before anything is written: labels and duplicates need all of them."""
    final = job.work / work.INSPECTION_FILE
    if final.exists():
        return
    chunk = min(max(count // 64, 16 if job.align else 256), 16384)
    tasks = [(job.work / f"inspect-{first:012d}", first, min(first + chunk, count)) for first in range(0, count, chunk)]
    size = job.inspection_dtype.itemsize
    missing = [task for task in tasks if not task[0].exists() or task[0].stat().st_size != size * (task[2] - task[1])]
    done = count - sum(stop - first for _, first, stop in missing)
    tell("looking", done, count)
    for looked in ordered_map(
        work.inspect_chunk, missing, workers=workers, initializer=work.start, initargs=(job, True)
    ):
        done += looked
        tell("looking", done, count)
    with open(job.work / (work.INSPECTION_FILE + ".tmp"), "wb") as file:
        for path, _, _ in tasks:
            file.write(patiently(path.read_bytes))
        atomic.commit(file, final)
    for path, _, _ in tasks:
        path.unlink()


@dataclass(frozen=True)
class _Plan:
    """What is written.

    Attributes:
        order: int64 [kept], catalogue rows in the order of writing.
        bounds: where shards begin and end in `order`.
        labels: uint32, by catalogue identity.
        label_map: names by label.
        issues: what was found.
    """

    order: np.ndarray
    bounds: np.ndarray
    labels: np.ndarray
    label_map: list[str]
    issues: Issues


def _decide(catalogue: Catalogue, inspection: np.ndarray, groups: np.ndarray | None, options: PackOptions) -> _Plan:
    issues = Issues(options.policies)
    for kind, tally in (("mismatch", catalogue.ledger.mismatches), ("unlabelled", catalogue.ledger.unlabelled)):
        issues.add(kind, tally.count, tally.names)
    flags = np.asarray(inspection["flags"])
    keep = np.ones(len(flags), dtype=bool)
    for kind, flag in (
        ("undecodable", images.UNDECODABLE),
        ("no_face", images.NO_FACE),
        ("wrong_size", images.WRONG_SIZE),
        ("grey", images.GREY),
    ):
        found = np.flatnonzero((flags & flag > 0) & keep)
        _note(issues, kind, found, catalogue, inspection)
        if issues.policy(kind) == "skip":
            keep[found] = False
    candidates = np.flatnonzero(keep & (flags & images.UNDECODABLE == 0))
    first_of = np.unique(inspection["hash"][candidates], return_index=True)[1]
    repeated = np.delete(candidates, first_of)
    _note(issues, "duplicate", repeated, catalogue, inspection)
    if issues.policy("duplicate") == "skip":
        keep[repeated] = False
    labels, label_map = _labels(catalogue, keep, issues)
    kept = np.flatnonzero(keep)
    if not len(kept):
        raise UserError("every image would be skipped; check the policies and the source")
    order, bounds = _order(kept, groups, options)
    return _Plan(order, bounds, labels, label_map, issues)


def _note(issues: Issues, kind: str, rows: np.ndarray, catalogue: Catalogue, inspection: np.ndarray) -> None:
    def name(row: int) -> str:
        size = f" ({inspection[row]['width']}x{inspection[row]['height']})" if kind == "wrong_size" else ""
        return _line(catalogue.name(row)) + size

    issues.add(kind, len(rows), [name(row) for row in rows[: Issues.LISTED].tolist()])


def _labels(catalogue: Catalogue, keep: np.ndarray, issues: Issues) -> tuple[np.ndarray, list[str]]:
    """Final label of each catalogue identity, and the names by final label."""
    identities = catalogue.identities
    images_left = np.bincount(catalogue.rows["identity"][keep], minlength=len(identities))
    names = [_line(catalogue.class_names.get(i, str(i)) if isinstance(i, int) else i) for i in identities]
    if catalogue.numeric:
        numbers = np.array([int(i) for i in identities], dtype=np.int64)
        gaps = int(numbers.max()) + 1 - len(numbers)
        if gaps:
            present = set(numbers.tolist())
            examples = (str(n) for n in range(int(numbers.max())) if n not in present)
            issues.add("label_gap", gaps, [next(examples) for _ in range(min(gaps, 100))])
    numbers_stay = catalogue.numeric and issues.policy("label_gap") == "keep"
    if numbers_stay:  # the source's numbers stay, so an identity without images cannot be dropped
        if int(numbers.max()) >= _LARGEST_KEPT:
            raise UserError(
                f"--label-gap keep would make {int(numbers.max()) + 1:,} classes for {len(numbers):,} identities; choose fix"
            )
        issues.overrule("empty_identity", "keep")
    empty = np.flatnonzero(images_left == 0)
    issues.add("empty_identity", len(empty), [names[i] for i in empty[: Issues.LISTED].tolist()])
    if numbers_stay:
        label_map = [catalogue.class_names.get(n, str(n)) for n in range(int(numbers.max()) + 1)]
        return numbers.astype(np.uint32), _distinct([_line(name) for name in label_map])
    stays = images_left > 0 if issues.policy("empty_identity") == "skip" else np.ones(len(identities), dtype=bool)
    labels = (np.cumsum(stays) - 1).clip(0).astype(np.uint32)
    return labels, _distinct([name for name, stay in zip(names, stays) if stay])


def _distinct(names: list[str]) -> list[str]:
    """The names, if they differ.

    Raises:
        UserError: two identities would have one name in labels.txt, so a choice by name would be ambiguous.
    """
    if len(set(names)) < len(names):
        twice, count = Counter(names).most_common(1)[0]
        raise UserError(f"{count} identities would be written as {twice!r}; rename them in the source")
    return names


def _line(name: str) -> str:
    """A name as one line of text, even if it is not UTF-8."""
    return name.replace("\n", " ").encode(errors="surrogateescape").decode(errors="backslashreplace")


def _order(kept: np.ndarray, groups: np.ndarray | None, options: PackOptions) -> tuple[np.ndarray, np.ndarray]:
    """Rows in the order of writing, and the bounds of the shards.

    If the source is read in groups, the groups are shuffled first, and then the rows inside each shard.
    """
    size = options.samples_per_shard
    if groups is None or not options.shuffle:
        bounds = np.append(np.arange(0, len(kept), size), len(kept))
        if options.shuffle:
            kept = kept[np.argsort(randomness.bits(options.seed, "pack/order", kept), kind="stable")]
        return kept, bounds
    run = groups[kept].astype(np.int64)
    kept = kept[np.lexsort((kept, run, randomness.bits(options.seed, "pack/run", run)))]
    run = groups[kept]
    edges = np.flatnonzero(np.append(True, run[1:] != run[:-1]))
    starts = [0]
    for edge in edges.tolist():
        if edge - starts[-1] >= size:
            starts.append(edge)
    bounds = np.array([*starts, len(kept)])
    shard = np.searchsorted(bounds, np.arange(len(kept)), side="right")
    return kept[np.lexsort((randomness.bits(options.seed, "pack/order", kept), shard))], bounds


def _write(job: work.Job, bounds: np.ndarray, workers: int, tell: Progress) -> None:
    tasks = [(number, int(bounds[number]), int(bounds[number + 1])) for number in range(len(bounds) - 1)]
    missing = [task for task in tasks if not _finished(job, task[0])]
    total = int(bounds[-1])
    done = total - sum(stop - first for _, first, stop in missing)
    tell("writing", done, total)
    for (_, first, stop), _ in zip(
        missing, ordered_map(work.write_shard, missing, workers=workers, initializer=work.start, initargs=(job, False))
    ):
        done += stop - first
        tell("writing", done, total)


def _finished(job: work.Job, number: int) -> bool:
    part, shard = work.part_path(job.work, number), job.out / work.shard_name(number)
    return part.exists() and shard.exists() and shard.stat().st_size == int(work.read_part(job.work, number)["size"])


def _commit(job: work.Job, plan: _Plan, options: PackOptions) -> tuple[Manifest, int]:
    writer = IndexWriter(job.out)
    encoded = 0
    for number in range(len(plan.bounds) - 1):
        part = work.read_part(job.work, number)
        writer.add_shard(
            work.shard_name(number),
            int(part["size"]),
            str(part["sha256"]),
            part["offsets"],
            part["lengths"],
            part["labels"],
        )
        encoded += int(part["encoded"])
    sizes = _sizes(job, plan, options)
    provenance = _provenance(job.source, options)
    manifest = writer.close(
        plan.label_map, provenance=provenance, seed=options.seed, licence=options.licence, image_size=sizes
    )
    return manifest, encoded


def _sizes(job: work.Job, plan: _Plan, options: PackOptions) -> tuple[int, int] | None:
    """(height, width) if all written images have the same, else None."""
    if options.size is not None and (options.align or options.policies.wrong_size != "keep"):
        return options.size, options.size
    inspection = np.memmap(job.work / work.INSPECTION_FILE, dtype=job.inspection_dtype, mode="r")
    chosen = inspection[plan.order]
    chosen = chosen[chosen["flags"] & images.UNDECODABLE == 0]
    pairs = np.unique(np.stack([chosen["height"], chosen["width"]], axis=1), axis=0)
    return (int(pairs[0, 0]), int(pairs[0, 1])) if len(pairs) == 1 else None


def _report(
    job: work.Job,
    catalogue: Catalogue,
    inspection: np.ndarray,
    plan: _Plan,
    manifest: Manifest,
    encoded: int,
    options: PackOptions,
) -> dict[str, Any]:
    issues = plan.issues.report()
    return {
        "source": str(job.source),
        "options": asdict(options),
        "images_found": len(catalogue.rows),
        "images_written": manifest.samples,
        "images_skipped": len(catalogue.rows) - manifest.samples,
        "images_encoded": encoded,
        "images_untouched": manifest.samples - encoded,
        "identities": manifest.num_classes,
        "shards": len(manifest.shards),
        "bytes": sum(shard.size for shard in manifest.shards),
        "fingerprint": manifest.fingerprint,
        "reconciliation": reconcile(catalogue.ledger, len(catalogue.rows), manifest.samples, issues),
        "left_out": {reason: asdict(tally) for reason, tally in catalogue.ledger.left_out.items()},
        "ignored": {reason: asdict(tally) for reason, tally in catalogue.ledger.ignored.items()},
        "troubles": issues,
    }


def _sheet(out: Path, manifest: Manifest) -> str:
    from lvtrain.data.shards import ShardDataset

    dataset = ShardDataset(out)
    rows = contact_sheet.of_index(dataset.index["label"], dataset.label_names(), lambda sample: dataset.read(sample)[0])
    title = f"{out.name}: {manifest.num_classes} identities, {manifest.samples} images"
    return contact_sheet.draw(rows, title, out / SHEET)
