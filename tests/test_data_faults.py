"""Faults of data: reported at the start with the file's name, or survived with the sample's place kept."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from lvtrain.data import Loader, ShardDataset
from lvtrain.data.decoding.jpeg import HeaderCheck, rescue
from lvtrain.data.index import RECORD, IndexWriter, open_index, read_manifest
from lvtrain.distributed.world import World
from lvtrain.errors import UserError
from lvtrain.files import reading
from lvtrain.training.telemetry import Telemetry
from lvtrain.training.trackers import TrackedRun
from tests.shard_data import jpeg, make_dataset


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def folder(clean, tmp_path):
    return shutil.copytree(clean, tmp_path / "data")


# -------------------------------------------------------------------------------------------------------- at start-up


def test_missing_manifest(tmp_path):
    with pytest.raises(UserError, match=r"dataset\.json"):
        ShardDataset(tmp_path)


def test_missing_shard_is_named(folder):
    (folder / "shards" / "000001.tar").unlink()
    with pytest.raises(UserError, match=r"000001\.tar"):
        ShardDataset(folder)


@pytest.mark.parametrize(("change", "word"), [(-1024, "cut short"), (512, "longer than recorded")])
def test_shard_of_another_size_is_named(folder, change, word):
    path = folder / "shards" / "000002.tar"
    os.truncate(path, path.stat().st_size + change)
    with pytest.raises(UserError, match=rf"000002\.tar is {word}"):
        ShardDataset(folder)


def test_cut_index_and_stale_index(folder):
    path = folder / "index.bin"
    os.truncate(path, path.stat().st_size - 20)
    with pytest.raises(UserError, match="index"):
        ShardDataset(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"index\.bin"):
        ShardDataset(folder)


def test_damaged_foreign_and_newer_manifest(folder):
    path = folder / "dataset.json"
    body = json.loads(path.read_text())
    for text, message in [
        (path.read_text()[:100], "is damaged"),
        ("[]", "is not a lvtrain dataset"),
        (json.dumps({**body, "schema": 99}), "has schema 99"),
        (json.dumps({key: value for key, value in body.items() if key != "shards"}), "is damaged"),
        (json.dumps({**body, "samples": "many"}), "is damaged"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            ShardDataset(folder)
    with pytest.raises(UserError, match=r"labels\.txt"):
        read_manifest(folder / "labels.txt")


@pytest.mark.parametrize("change", ["less", "more", "swapped", "latin1"])
def test_names_of_another_dataset_are_refused(folder, change):
    """With a line more or less, every identity after it would have another's name."""
    path = folder / "labels.txt"
    lines = path.read_bytes().splitlines(keepends=True)
    assert ShardDataset(folder).label_names() == [line.decode().rstrip("\n") for line in lines]
    swapped = [lines[1], lines[0], *lines[2:]]
    changed = {"less": lines[1:], "more": [b"x\n", *lines], "swapped": swapped, "latin1": [b"\xff\n", *lines[1:]]}
    path.write_bytes(b"".join(changed[change]))
    with pytest.raises(UserError, match=r"labels\.txt"):
        ShardDataset(folder).label_names()


def test_label_that_is_not_a_class(folder):
    index = np.memmap(folder / "index.bin", dtype=RECORD, mode="r+", offset=64)
    index["label"][40] = 5
    index.flush()
    dataset = ShardDataset(folder)
    with pytest.raises(UserError, match=r"label 5.* 5 classes"):
        dataset.check_labels()
    with (
        Loader(dataset, seed=0, micro_batch=41, micro_batches=1) as loader,
        pytest.raises(UserError, match="holds label 5"),
    ):
        next(loader)


def test_writer_refuses_nothing_and_labels_without_name(tmp_path):
    with pytest.raises(UserError, match="no sample"):
        IndexWriter(tmp_path).close(["a"])
    writer = IndexWriter(tmp_path)
    writer.add_shard("shards/0.tar", 5000, "0", [512], [10], [3])
    with pytest.raises(UserError, match="label 3"):
        writer.close(["a"])
    with pytest.raises(UserError, match="ends behind"):
        writer.add_shard("shards/1.tar", 100, "0", [512], [10], [3])
    assert not (tmp_path / "dataset.json").exists() and not (tmp_path / "index.bin").exists()


def test_fingerprint_changes_with_what_matters(folder, tmp_path):
    before = ShardDataset(folder).fingerprint
    assert before == ShardDataset(folder / "dataset.json").fingerprint
    path = folder / "dataset.json"
    body = json.loads(path.read_text())
    shards = body["shards"]
    other_bytes = [{**shards[0], "sha256": "0" * 64}, *shards[1:]]
    for change in (
        {"shards": shards[::-1]},
        {"shards": other_bytes},
        {"index_sha256": "0" * 64},
        {"labels_sha256": "0" * 64},
    ):
        path.write_text(json.dumps(body | change))
        assert read_manifest(folder).fingerprint != before
    assert ShardDataset(make_dataset(tmp_path / "other", samples=42)).fingerprint != before


# ---------------------------------------------------------------------------------------------------- while training


def damage(folder, sample, change):
    dataset = ShardDataset(folder)
    record = dataset.records(np.array([sample]))[0]
    with open(folder / dataset.manifest.shards[record["shard"]].name, "r+b") as file:
        file.seek(int(record["offset"]))
        data = change(file.read(int(record["length"])))
        assert len(data) == int(record["length"])
        file.seek(int(record["offset"]))
        file.write(data)


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_undecodable_samples_keep_their_slot(folder, backend):
    noise = np.random.default_rng(0).integers(0, 256, 20_000).astype(np.uint8).tobytes()
    damage(folder, 2, lambda data: bytes(len(data)))
    damage(folder, 7, lambda data: data[:2] + noise[: len(data) - 4] + data[-2:])
    damage(folder, 30, lambda data: data[:300] + noise[: len(data) - 302] + data[-2:])
    with Loader(ShardDataset(folder), seed=1, micro_batch=16, micro_batches=4, backend=backend) as loader:
        batches = [next(loader) for _ in range(6)]
        ids = torch.cat([batch.sample_ids for batch in batches])
        labels = torch.cat([batch.labels for batch in batches])
        images = torch.cat([batch.images for batch in batches])
        assert np.array_equal(ids.numpy(), loader.order.at(range(96)))
        bad = torch.isin(ids, torch.tensor([2, 7, 30]))
        assert (
            torch.equal(labels == -1, bad)
            and bool((images[bad] == 0).all())
            and bool((images[~bad].std((1, 2, 3)) > 0.1).all())
        )
        assert loader.bad_count == int(bad.sum()) and loader.seen_count == 96
        named = {(sample.sample_id, sample.shard, sample.key) for sample in loader.bad_samples}
        assert named == {(i, f"shards/{i // 14:06d}.tar", f"{i:09d}") for i in (2, 7, 30)}  # each once


def test_a_sample_that_fails_inside_dali_costs_a_new_pipeline_only(tmp_path):
    """The markers are in order, what they hold is not: DALI raises, its pipeline is lost, and Pillow decides."""
    whole = jpeg(3)
    at = whole.index(b"\xff\xc4") + 5
    bogus_huffman = whole[:at] + b"\xff" * 4 + whole[at + 4 :]  # Pillow refuses it too
    second_frame = whole[:1500] + b"\xff\xc3" + whole[20:40] + whole[1522:]  # Pillow reads the upper half
    assert HeaderCheck(None).problem(bogus_huffman) is None and HeaderCheck(None).problem(second_frame) is None
    folder = make_dataset(tmp_path, replaced={3: bogus_huffman, 9: bogus_huffman, 17: second_frame})
    with Loader(ShardDataset(folder), seed=1, micro_batch=16, micro_batches=1, backend="dali") as loader:
        batches = [next(loader) for _ in range(6)]
    labels = torch.cat([batch.labels for batch in batches])
    ids = torch.cat([batch.sample_ids for batch in batches])
    assert np.array_equal(ids.numpy(), loader.order.at(range(96)))
    assert set(ids[labels == -1].tolist()) == {3, 9}


def test_other_formats_grey_and_odd_sizes_are_read(tmp_path):
    picture = Image.open(io.BytesIO(jpeg(1)))

    def stored(image, kind, **options):
        out = io.BytesIO()
        image.save(out, kind, **options)
        return out.getvalue()

    upside_down = Image.Exif()
    upside_down[0x0112] = 3
    replaced = {
        0: stored(picture, "PNG"),
        1: stored(picture.convert("L"), "JPEG"),
        2: stored(picture.convert("CMYK"), "JPEG"),
        3: stored(picture.resize((90, 70)), "JPEG"),
        4: stored(picture, "JPEG", progressive=True),
        5: stored(picture, "JPEG", optimize=True, exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00"),
        6: stored(picture, "WEBP"),
        7: stored(picture.rotate(180), "JPEG", quality=95, exif=upside_down),
        8: stored(picture, "JPEG", quality=95, subsampling="4:4:4", restart_marker_blocks=3),
        9: stored(picture, "JPEG", quality=95, subsampling="4:2:2"),
    }
    folder = make_dataset(tmp_path, samples=10, shards=1, replaced=replaced)
    batches = {}
    for backend in ("dali", "torch"):
        with Loader(
            ShardDataset(folder), seed=1, micro_batch=10, micro_batches=1, backend=backend, augmentation="none"
        ) as loader:
            batches[backend] = batch = next(loader)
        assert not loader.bad_samples
    assert torch.equal(batches["dali"].images, batch.images)
    pixels = torch.from_numpy((np.asarray(picture).astype(np.float32) - 127.5) / 127.5).permute(2, 0, 1)
    row = {int(sample): number for number, sample in enumerate(batch.sample_ids)}
    torch.testing.assert_close(batch.images[row[0]], pixels, atol=1e-6, rtol=0)
    for sample in range(2, 10):
        assert (batch.images[row[sample]] - pixels).abs().mean() < 0.06, sample
    grey = batch.images[row[1]]
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[1], grey[2])


def test_failing_reads_are_retried_and_told(clean, monkeypatch):
    messages = []
    dataset = ShardDataset(clean, warn=messages.append, pause=0.01)
    expected = dataset.read(5)
    real, failures = os.pread, [errno.EIO, errno.ESTALE]

    def pread(*arguments):
        if failures:
            raise OSError(failures.pop(), "Input/output error")
        return real(*arguments)

    monkeypatch.setattr(os, "pread", pread)
    assert dataset.read(5) == expected
    assert len(messages) == 2 and "attempt 2 of 6 in 0.01 s" in messages[0] and "in 0.02 s" in messages[1]


def test_a_read_that_never_works_ends_the_run_and_costs_no_sample(folder):
    dataset = ShardDataset(folder, attempts=2, pause=0.01)
    (folder / "shards" / "000000.tar").rename(folder / "gone.tar")
    with pytest.raises(FileNotFoundError) as caught:
        dataset.read(0)
    assert caught.value.filename == str(folder / "shards" / "000000.tar") and "2 attempts" in caught.value.strerror
    with Loader(dataset, seed=1, micro_batch=41, micro_batches=1) as loader, pytest.raises(FileNotFoundError):
        next(loader)


def test_bytes_that_come_in_parts_are_put_together(clean, monkeypatch):
    dataset = ShardDataset(clean)
    expected, real = dataset.read(5), os.pread
    monkeypatch.setattr(os, "pread", lambda handle, length, offset: real(handle, -(-length // 2), offset))
    assert dataset.read(5) == expected
    assert (
        reading.pread(os.open(clean / "dataset.json", os.O_RDONLY), 10**6, 3)
        == (clean / "dataset.json").read_bytes()[3:]
    )


def test_a_shard_cut_while_training(folder):
    dataset = ShardDataset(folder)
    os.truncate(folder / "shards" / "000002.tar", 3000)
    with Loader(dataset, seed=1, micro_batch=41, micro_batches=1) as loader:
        batch = next(loader)
    assert int((batch.labels == -1).sum()) == 13
    assert "ends after 3000 bytes" in " ".join(sample.reason for sample in loader.bad_samples)


def test_a_stalling_read_is_told(clean, monkeypatch):
    """The first read ends only when the waiting rank has reported that it waits."""
    messages, waiting = [], threading.Event()

    def warn(message):
        messages.append(message)
        if "has waited" in message:
            waiting.set()

    real = os.pread
    monkeypatch.setattr(os, "pread", lambda *arguments: (waiting.wait(60), real(*arguments))[1])
    dataset = ShardDataset(clean, warn=warn, slow_seconds=0)
    with Loader(dataset, seed=1, micro_batch=1, micro_batches=1, prefetch=1, stall_seconds=0.05) as loader:
        next(loader)
    assert any("took" in line and "stalling" in line for line in messages)
    assert "rank 0 has waited" in " ".join(messages)


def test_reads_ahead_go_on_side_by_side_and_change_nothing(clean, monkeypatch):
    def batches(read_ahead):
        with Loader(ShardDataset(clean), seed=1, micro_batch=4, micro_batches=1, read_ahead=read_ahead) as loader:
            return [next(loader) for _ in range(12)]

    expected = batches(1)
    real, together, readers = os.pread, threading.Barrier(4), set()

    def met(*arguments):
        """Each reader's first read waits for the first reads of three others."""
        if threading.get_ident() not in readers:
            readers.add(threading.get_ident())
            together.wait(60)
        return real(*arguments)

    monkeypatch.setattr(os, "pread", met)
    for batch, reference in zip(batches(4), expected):
        assert torch.equal(batch.images, reference.images) and torch.equal(batch.labels, reference.labels)
    assert len(readers) == 4 and not together.broken


# ------------------------------------------------------------------------------------------------- the header's check


def test_header_check_takes_good_and_refuses_broken():
    check = HeaderCheck((112, 112))
    good = jpeg(0)
    assert check.problem(good) is None and check.problem(jpeg(1)) is None
    assert "no bytes" in check.problem(b"")
    assert "end-of-image" in check.problem(good[: len(good) // 2])
    assert "does not start" in check.problem(b"\x00" + good)
    assert "expected" in check.problem(jpeg(0, (70, 90)))
    for orientation, upright in ((1, True), (6, False)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        out = io.BytesIO()
        Image.new("RGB", (112, 112)).save(out, "JPEG", exif=exif)
        assert (check.problem(out.getvalue()) is None) == upright
    for at in (2, 4, 20, 163, 180, 600):  # marker, length and frame bytes
        wrong = bytearray(good)
        wrong[at] ^= 0x55
        problem = check.problem(bytes(wrong))
        assert (
            problem is None or rescue(bytes(wrong), (112, 112)) is None or "expected" in problem or "damaged" in problem
        )


def test_sizes_of_large_datasets(tmp_path):
    """An index of 260 million samples (5.2 GB, sparse here) opens without being read."""
    samples = 260_000_000
    writer = IndexWriter(tmp_path)
    writer.add_shard("shards/0.tar", 10_000, "0", [512], [10], [0])
    manifest = writer.close(["a"])
    with open(tmp_path / "index.bin", "r+b") as file:
        head = bytearray(file.read(64))
        head[16:24] = samples.to_bytes(8, "little")
        file.seek(0)
        file.write(head)
        file.truncate(64 + RECORD.itemsize * samples)
    assert RECORD.itemsize <= 24 and (tmp_path / "index.bin").stat().st_size <= 6 * 2**30
    index = open_index(tmp_path, type(manifest)(**{**vars(manifest), "samples": samples}))
    assert len(index) == samples and int(index["label"][-1]) == 0


def test_what_one_rank_saw_is_told_by_that_rank(tmp_path, capsys):
    telemetry = Telemetry(TrackedRun(tmp_path, "run", {}), World(3, 4, 1, torch.device("cpu")))
    telemetry.say("of all ranks")
    telemetry.warn("reading shards/000000.tar failed")
    assert capsys.readouterr().out == "warning: rank 3: reading shards/000000.tar failed\n"
