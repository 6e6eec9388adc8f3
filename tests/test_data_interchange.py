"""The tars are plain WebDataset: the webdataset library and DALI's own reader find the same bytes and labels where our index says."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from lvtrain.data import ShardDataset
from tests.shard_data import make_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return ShardDataset(make_dataset(tmp_path_factory.mktemp("data"), samples=25, size=(20, 24)))


def shards(dataset):
    return [str(dataset.folder / shard.name) for shard in dataset.manifest.shards]


def test_webdataset_reads_them(dataset):
    import webdataset

    found = list(webdataset.WebDataset(shards(dataset), shardshuffle=False))
    assert [(sample["jpg"], int(sample["cls"])) for sample in found] == [dataset.read(i) for i in range(25)]
    assert [sample["__key__"] for sample in found] == [dataset.describe(i)[1] for i in range(25)]


def test_dalis_own_reader_reads_them(dataset):
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=25, num_threads=1, device_id=None)
    def graph():
        images, labels = fn.readers.webdataset(paths=shards(dataset), ext=["jpg", "cls"])
        return images, labels

    pipeline = graph()
    pipeline.build()
    images, labels = pipeline.run()
    for i in range(25):
        data, label = dataset.read(i)
        assert np.asarray(images[i]).tobytes() == data
        assert int(bytes(np.asarray(labels[i]))) == label


def test_reading_by_id_needs_no_torch(dataset):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from lvtrain.data import SampleOrder, ShardDataset\n"
        f"d = ShardDataset({str(dataset.folder)!r}); print(len(d), d.num_classes, len(d.read(3)[0]), SampleOrder(len(d), 0, 4).at(range(3)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"25 5 {len(dataset.read(3)[0])}")
