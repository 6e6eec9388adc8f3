"""`StreamDataset`: shards behind a URL or a pipe give what `ShardDataset` reads from the disk, each sample once."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lvtrain.data import ShardDataset, StreamDataset
from lvtrain.data.images import decode
from lvtrain.errors import UserError
from tests.shard_data import make_dataset

COUNT, SHARDS, SIZE = 41, 5, 24
BAD = 17


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bad = {BAD: b"no image"}
    return make_dataset(tmp_path_factory.mktemp("data"), samples=COUNT, shards=SHARDS, size=(SIZE, SIZE), replaced=bad)


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def pattern(start: str) -> str:
    return f"{start}/shards/{{000000..{SHARDS - 1:06d}}}.tar"


def read(urls: str, **options) -> list[tuple[str, int, torch.Tensor]]:
    stream = StreamDataset(urls, image_size=SIZE, warn=lambda line: None, **options)
    return [(sample.key, sample.label, sample.image) for sample in stream]


@pytest.mark.parametrize("kind", ["http", "pipe", "path"])
def test_it_gives_what_lies_on_the_disk(kind: str, folder: Path, address: str) -> None:
    start = {"http": address, "pipe": f"pipe:cat {folder}", "path": str(folder)}[kind]
    found, dataset = read(pattern(start), shuffle=0), ShardDataset(folder)
    assert [key for key, _, _ in found] == [dataset.describe(i)[1] for i in range(COUNT)]
    for i, (_, label, image) in enumerate(found):
        data, expected = dataset.read(i)
        assert label == (-1 if i == BAD else expected)
        pixels = np.zeros((SIZE, SIZE, 3), np.uint8) if i == BAD else decode(data)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)


def test_shuffled_each_sample_comes_once_and_again_in_the_same_order(folder: Path) -> None:
    urls = pattern(str(folder))
    orders = {epoch: [] for epoch in (0, 1)}
    for epoch in orders:
        stream = StreamDataset(urls, image_size=SIZE, shuffle=12, seed=3, warn=lambda line: None)
        stream.set_epoch(epoch)
        orders[epoch] = [sample.key for sample in stream]
        assert orders[epoch] == [sample.key for sample in stream]
    keys = sorted(orders[0])
    assert len(set(keys)) == COUNT == len(keys) and sorted(orders[1]) == keys
    assert orders[0] != orders[1] != keys != orders[0]


def test_ranks_and_workers_divide_the_shards(folder: Path) -> None:
    found = []
    for rank in range(2):
        stream = StreamDataset(pattern(str(folder)), image_size=SIZE, rank=rank, size=2, warn=lambda line: None)
        for images, labels, keys in DataLoader(stream, batch_size=4, num_workers=2):
            assert images.dtype == torch.uint8 and images.shape[1:] == (3, SIZE, SIZE) and labels.dtype == torch.int64
            found += keys
    assert len(found) == COUNT == len(set(found))


def test_without_end_it_begins_the_next_epoch(folder: Path) -> None:
    stream = StreamDataset(pattern(str(folder)), image_size=SIZE, repeat=True, warn=lambda line: None)
    samples = iter(stream)
    keys = [next(samples).key for _ in range(2 * COUNT)]
    assert sorted(keys[:COUNT]) == sorted(keys[COUNT:]) and keys[:COUNT] != keys[COUNT:]


def test_what_it_gives_up_and_what_is_bad_is_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    list(StreamDataset(pattern(str(folder)), image_size=SIZE))
    first, bad = [record.getMessage() for record in caplog.records if record.name.startswith("lvtrain")]
    assert "ShardDataset" in first and f"{BAD:09d}" in bad


def test_a_shard_that_is_not_whole_is_named(folder: Path, tmp_path: Path, address: str) -> None:
    cut = tmp_path / "cut.tar"
    cut.write_bytes((folder / "shards" / "000000.tar").read_bytes()[:2000])
    for url in (str(cut), f"pipe:cat {tmp_path}/missing.tar", f"{address}/missing.tar"):
        with pytest.raises(UserError, match=url.split("/")[-1]):
            read(url)
    with pytest.raises(UserError, match="ranks"):
        read(pattern(str(folder)), size=SHARDS + 1)


@pytest.mark.parametrize("path", ["https://host/faces", "pipe:cat faces", "s3://bucket/faces"])
def test_the_trainers_dataset_says_what_reads_an_address(path: str) -> None:
    with pytest.raises(UserError, match="StreamDataset"):
        ShardDataset(path)
