"""Packs any source into a dataset folder: list, inspect, decide, write.

Every stage leaves files in `OUT/.pack`. So a killed pack continues when it is started again with the same options. A shard
gets its final name when it is complete. `dataset.json` is written last and makes the folder a dataset. The result does not
depend on the number of workers.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lvtrain.data import align
from lvtrain.data.index import IndexWriter, Manifest
from lvtrain.datasets import contact_sheet
from lvtrain.datasets.catalogue import Catalogue, CatalogueWriter
from lvtrain.datasets.importer import IMPORTERS, open_importer
from lvtrain.datasets.packing import images, work
from lvtrain.datasets.packing.options import PackOptions
from lvtrain.datasets.packing.plan import Plan, decide
from lvtrain.datasets.packing.reconcile import reconcile
from lvtrain.datasets.parallel import ordered_map
from lvtrain.errors import UserError
from lvtrain.files import atomic
from lvtrain.files.patience import patiently
from lvtrain.files.reading import parse_json

Progress = Callable[[str, int, int], None]
REPORT = "pack_report.json"
FINISHED = ".pack_finished"  # the scratch folder of a finished pack, until it is removed
SHEET = "contact_sheet.png"


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
    plan = decide(catalogue, inspection, opened.read_groups(catalogue), options)
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
    packed = parse_json(patiently((out / "dataset.json").read_text)).get("provenance", {})
    is_same = json.loads(json.dumps(_provenance(source, options))) == packed
    report: dict[str, Any] | None = parse_json(patiently((out / REPORT).read_text)) if is_same else None
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
            begun = dict(parse_json(path.read_text()))
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
    lock = os.open(scratch / "lock", os.O_WRONLY | os.O_CREAT)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another pack is writing {scratch.parent}; wait for it, or choose another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        with contextlib.suppress(OSError):  # nothing was written to it, and the pack may have ended
            os.close(lock)


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


def _commit(job: work.Job, plan: Plan, options: PackOptions) -> tuple[Manifest, int]:
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


def _sizes(job: work.Job, plan: Plan, options: PackOptions) -> tuple[int, int] | None:
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
    plan: Plan,
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
