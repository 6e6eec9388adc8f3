"""A packed dataset in other people's loaders: webdataset, DALI's own reader and Megatron Energon find its keys, labels and pixels."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lvtrain.data import ShardDataset
from lvtrain.datasets.packing import PackOptions, pack
from tests.runs import tool
from tests.shard_data import jpeg

SIZE, COUNT = 40, 25


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    """25 images of 5 identities as pack_dataset leaves them: some encoded anew, names with dots, spaces and other letters."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("packed") / "data"
    for i in range(COUNT):
        folder = source / f"id {i % 5}.é"
        folder.mkdir(exist_ok=True)
        if i % 7 == 3:
            Image.open(io.BytesIO(jpeg(i, (SIZE, SIZE)))).save(folder / f"a.{i}.png")
        else:
            (folder / f"b {i}.v2.jpg").write_bytes(jpeg(i, (SIZE, SIZE)))
    pack(source, out, PackOptions("folder", size=SIZE, samples_per_shard=9, licence="CC0-1.0"))
    return ShardDataset(out)


@pytest.fixture(scope="module")
def expected(dataset: ShardDataset) -> list[tuple[str, int, np.ndarray]]:
    """Key, label and pixels in order, by tarfile and Pillow alone."""
    found = []
    for shard in sorted(dataset.folder.glob("shards/*.tar")):
        with tarfile.open(shard) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name, data in members.items():
            if name.endswith(".jpg"):
                key = name.removesuffix(".jpg")
                found.append((key, int(members[f"{key}.cls"]), np.asarray(Image.open(io.BytesIO(data)))))
    assert len(found) == COUNT and {label for _, label, _ in found} == set(range(5))
    return found


def shards(dataset: ShardDataset) -> list[str]:
    return [str(dataset.folder / shard.name) for shard in dataset.manifest.shards]


def contents(dataset: ShardDataset) -> dict[Path, bytes]:
    files = (path for path in dataset.folder.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in files}


def same(found: list[tuple[str, int, Any]], expected: list[tuple[str, int, np.ndarray]]) -> bool:
    return [each[:2] for each in found] == [each[:2] for each in expected] and all(
        np.array_equal(mine[2], theirs[2]) for mine, theirs in zip(found, expected)
    )


def test_ours_reads_them(dataset: ShardDataset, expected: list[tuple[str, int, np.ndarray]]) -> None:
    read = [(dataset.describe(i)[1], *dataset.read(i)) for i in range(len(dataset))]
    assert same([(key, label, np.asarray(Image.open(io.BytesIO(data)))) for key, data, label in read], expected)


def test_webdataset_reads_them(dataset: ShardDataset, expected: list[tuple[str, int, np.ndarray]]) -> None:
    import webdataset

    opened = webdataset.WebDataset(shards(dataset), shardshuffle=False).decode("rgb8").to_tuple("__key__", "cls", "jpg")
    assert same(list(opened), expected)


def test_dalis_own_reader_reads_them(dataset: ShardDataset, expected: list[tuple[str, int, np.ndarray]]) -> None:
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=COUNT, num_threads=1, device_id=None)
    def graph() -> Any:
        images, labels = fn.readers.webdataset(paths=shards(dataset), ext=["jpg", "cls"], name="shards")
        return fn.decoders.image(images, device="cpu"), labels, fn.get_property(images, key="source_info")

    pipeline = graph()
    pipeline.build()
    images, labels, sources = pipeline.run()
    found = []
    for i in range(COUNT):
        key = bytes(np.asarray(sources[i])).decode().split(":")[-1].removesuffix(".jpg")
        found.append((key, int(bytes(np.asarray(labels[i]))), np.asarray(images[i])))
    assert same(found, expected)


def test_energon_reads_them(dataset: ShardDataset, expected: list[tuple[str, int, np.ndarray]]) -> None:
    energon = pytest.importorskip("megatron.energon")
    before = contents(dataset)
    assert tool("energon", dataset.folder).exit_code == 0
    assert ShardDataset(dataset.folder).fingerprint == dataset.fingerprint
    assert before.items() <= contents(dataset).items()
    workers = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    opened = energon.get_val_dataset(dataset.folder, split_part="train", batch_size=None, worker_config=workers)
    found = []
    for sample in energon.get_loader(opened):
        pixels = (sample.image.permute(1, 2, 0) * 255).round().byte().numpy()
        found.append((sample.__key__, int(sample.label), pixels))
    assert same(found, expected)


def test_the_metadata_is_what_energon_prepares(dataset: ShardDataset, tmp_path: Path) -> None:
    """`energon prepare` reads the tars; ours follows from the index, to the same bytes."""
    pytest.importorskip("megatron.energon")
    import json
    import shutil

    import yaml
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    names = [shard.name for shard in dataset.manifest.shards]
    for folder in ("ours", "theirs"):
        shutil.copytree(dataset.folder, tmp_path / folder, ignore=shutil.ignore_patterns(".nv-meta", "*.idx"))
    assert tool("energon", tmp_path / "ours").exit_code == 0
    WebdatasetPreparator.prepare_dataset(
        tmp_path / "theirs", names, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=1
    )
    for name in names:
        assert (tmp_path / "ours" / f"{name}.idx").read_bytes() == (tmp_path / "theirs" / f"{name}.idx").read_bytes()
    infos = [json.loads((tmp_path / f / ".nv-meta" / ".info.json").read_text()) for f in ("ours", "theirs")]
    assert infos[0]["shard_counts"] == infos[1]["shard_counts"]
    (tmp_path / "ours" / ".nv-meta" / "split.yaml").write_text(yaml.safe_dump({"split_parts": {"train": names[:1]}}))
    assert tool("energon", tmp_path / "ours").exit_code == 0  # an edited split stays
    assert yaml.safe_load((tmp_path / "ours" / ".nv-meta" / "split.yaml").read_text())["split_parts"] == {
        "train": names[:1]
    }
    assert tool("energon", tmp_path / "theirs" / "missing").exit_code == 2


def test_reading_by_id_needs_no_torch(dataset: ShardDataset) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from lvtrain.data import SampleOrder, ShardDataset\n"
        f"d = ShardDataset({str(dataset.folder)!r}); print(len(d), d.num_classes, len(d.read(3)[0]), SampleOrder(len(d), 0, 4).at(range(3)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"25 5 {len(dataset.read(3)[0])}")
