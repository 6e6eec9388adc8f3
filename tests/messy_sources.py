"""Shared by tests of importers: images that differ in their bytes, small sources, and a pack whose sum is checked."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lvtrain.data.shards import ShardDataset
from lvtrain.datasets import recordio
from lvtrain.datasets.catalogue import Catalogue, CatalogueWriter
from lvtrain.datasets.importer import open_importer
from lvtrain.datasets.packing import PackOptions, Policies, pack

LENIENT = Policies(unlabelled="skip", mismatch="keep")


def jpeg(number: int) -> bytes:
    picture = io.BytesIO()
    Image.new("RGB", (112, 112), (number % 256, number // 256, 77)).save(picture, "JPEG")
    return picture.getvalue() + struct.pack("<I", number)  # behind the image's end


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def listed(kind: str, source: Path, scratch: Path, **options: Any) -> tuple[list[tuple[Any, bytes]], CatalogueWriter]:
    """(label, bytes) of every image that an importer lists, and the writer with its ledger."""
    importer, out = open_importer(kind, source, options), CatalogueWriter(scratch)
    importer.scan(out)
    out.close("natural")
    catalogue = Catalogue.open(scratch)
    rows = range(len(catalogue.rows))
    return [(catalogue.identities[catalogue.rows[row]["identity"]], importer.read(catalogue, row)) for row in rows], out


def packed(kind: str, source: Path, out: Path, policies: Policies = LENIENT, **options: Any) -> dict[str, Any]:
    report = pack(source, out, PackOptions(kind, policies=policies, options=options))
    total = report["reconciliation"]
    assert total["announced"] + total["unannounced"] == (
        total["packed"] + sum(total["skipped"].values()) + sum(total["refused"].values())
    )
    assert json.loads((out / "pack_report.json").read_text())["reconciliation"] == total
    return report


def people(out: Path) -> dict[str, int]:
    dataset = ShardDataset(out)
    counts = np.bincount(dataset.labels(np.arange(len(dataset))), minlength=dataset.num_classes)
    return dict(zip(dataset.label_names(), counts.tolist()))


def write_rec(folder: Path, images: int = 18, classes: int = 6) -> Path:
    """Insightface's arrangement with `property`: three images an identity."""
    folder.mkdir()
    with recordio.RecordWriter(folder / "train.rec") as rec:
        rec.write(0, recordio.pack_record([images + 1, images + 1 + classes]))
        for key in range(1, images + 1):
            rec.write(key, recordio.pack_record((key - 1) * classes // images, jpeg(key)))
        for label in range(classes):
            rec.write(images + 1 + label, recordio.pack_record([1 + 3 * label, 4 + 3 * label]))
    (folder / "property").write_text(f"{classes},112,112\n")
    return folder / "train.rec"


def write_table(
    path: Path, labels: list[Any], names: list[str] | None = None, first: int = 0, kind: Any = None
) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": [jpeg(first + n) for n in range(len(labels))], "label": pa.array(labels, type=kind)})
    if names is not None:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    parquet.write_table(table, path, row_group_size=4)
