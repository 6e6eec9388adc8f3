"""Subsets as manifests: nested, relabelled without gaps, read through the loader, refused when stale; the shard cache."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from lvtrain.data import Loader, ShardDataset
from lvtrain.data.cache import cached
from lvtrain.data.subset import DROPPED
from lvtrain.datasets.subset import choose, write_subset
from lvtrain.errors import UserError
from tests.shard_data import make_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), samples=200, classes=40, shards=4, size=(16, 16))


@pytest.fixture(scope="module")
def whole(folder):
    return ShardDataset(folder)


def test_fractions_and_shots_are_nested(whole):
    labels = whole.labels(np.arange(200))
    previous: set[int] = set()
    for fraction in (0.01, 0.1, 0.5, 1.0):
        chosen = set(choose(whole, fraction=fraction, seed=3).tolist())
        identities = {int(labels[i]) for i in chosen}
        assert len(identities) == max(1, round(40 * fraction)) and previous <= chosen
        assert len(chosen) == 5 * len(identities)  # every image of a chosen identity
        previous = chosen
    previous = set()
    for shots in (1, 2, 4, 10):
        ids = choose(whole, shots=shots, seed=3)
        assert np.array_equal(np.bincount(labels[ids]), np.full(40, min(shots, 5)))
        assert previous <= set(ids.tolist()) and np.array_equal(ids, np.sort(ids))
        previous = set(ids.tolist())
    assert not np.array_equal(choose(whole, fraction=0.5, seed=3), choose(whole, fraction=0.5, seed=4))


def test_lists(whole):
    labels = whole.labels(np.arange(200))
    kept = choose(whole, identities=["person_3", "person_7"], without_samples=[int(np.flatnonzero(labels == 3)[0])])
    assert sorted(np.bincount(labels[kept])[[3, 7]].tolist()) == [4, 5] and len(kept) == 9
    assert 5 not in labels[choose(whole, without_identities=["person_5"])]
    assert len(np.unique(labels[choose(whole, min_images=5, without_samples=[0])])) == 39
    with pytest.raises(UserError, match="'nobody'"):
        choose(whole, identities=["nobody"])
    with pytest.raises(UserError, match="nothing of"):
        choose(whole, min_images=6)
    with pytest.raises(UserError, match="fraction=0"):
        choose(whole, fraction=0)
    # 0.28 x 25 is 7.000000000000001, and 7 identities
    assert len(np.unique(labels[choose(whole, fraction=0.28, identities=[f"person_{i}" for i in range(25)])])) == 7
    for outside in (-1, 200):
        with pytest.raises(UserError, match=r"\[0, 200\)"):
            choose(whole, without_samples=[outside])


def test_a_subset_is_a_dataset(whole, tmp_path):
    ids = choose(whole, fraction=0.2, shots=3, seed=1)
    subset = ShardDataset(write_subset(tmp_path / "few.json", whole, ids, seed=1))
    assert len(subset) == 24 and subset.num_classes == 8 and subset.fingerprint != whole.fingerprint
    subset.check_labels()
    old = whole.labels(ids)
    assert np.array_equal(subset.labels(np.arange(24)), np.unique(old, return_inverse=True)[1])
    assert subset.label_names() == [f"person_{label}" for label in np.unique(old)]
    assert subset.read(7) == (whole.read(int(ids[7]))[0], int(subset.labels(np.array([7]))[0]))
    with Loader(subset, seed=0, micro_batch=24, micro_batches=1, augmentation="none", image_size=16) as loader:
        batch = next(loader)
    assert sorted(batch.sample_ids.tolist()) == list(range(24))
    assert np.array_equal(batch.labels.numpy(), subset.labels(batch.sample_ids.numpy()))


def test_merged_identities(whole, tmp_path):
    label_of = np.full(40, DROPPED, dtype=np.uint32)
    label_of[[3, 9, 11]] = [0, 0, 1]  # 3 and 9 are one identity
    ids = np.flatnonzero(np.isin(whole.labels(np.arange(200)), [3, 9, 11]))
    subset = ShardDataset(write_subset(tmp_path / "merged.json", whole, ids, label_of=label_of))
    assert np.bincount(subset.labels(np.arange(15))).tolist() == [10, 5]
    assert subset.label_names() == ["person_3", "person_11"]
    label_of[11] = 2
    with pytest.raises(UserError, match="gaps"):
        write_subset(tmp_path / "gap.json", whole, ids, label_of=label_of)
    with pytest.raises(UserError, match="distinct"):
        write_subset(tmp_path / "twice.json", whole, np.array([1, 1]))


def test_a_subset_of_a_subset_is_one_of_the_dataset(whole, tmp_path):
    """One shot of a cleaned set, in which 3 and 9 are one identity and 5 is dropped."""
    label_of = np.full(40, DROPPED, dtype=np.uint32)
    label_of[[3, 9, 11, 20]] = [0, 0, 1, 2]
    labels = whole.labels(np.arange(200))
    cleaned = ShardDataset(
        write_subset(tmp_path / "a.json", whole, np.flatnonzero(label_of[labels] != DROPPED), label_of=label_of)
    )
    ids = choose(cleaned, shots=1, without_identities=["person_11"])
    few = ShardDataset(write_subset(tmp_path / "b.json", cleaned, ids))
    assert len(few) == few.num_classes == 2 and few.label_names() == ["person_3", "person_20"]
    assert [few.read(row) for row in range(2)] == [
        (cleaned.read(int(sample))[0], row) for row, sample in enumerate(ids)
    ]


def test_stale_missing_and_cut_subsets_are_refused(whole, tmp_path):
    path = write_subset(tmp_path / "part.json", whole, np.arange(50))
    body = json.loads(path.read_text())
    path.write_text(json.dumps({**body, "dataset_fingerprint": "0" * 16}))
    with pytest.raises(UserError, match="another state"):
        ShardDataset(path)
    path.write_text(json.dumps(body))
    binary = path.with_suffix(".bin")
    data = binary.read_bytes()
    binary.write_bytes(data[:-8])
    with pytest.raises(UserError, match="does not belong"):
        ShardDataset(path)
    binary.unlink()
    with pytest.raises(UserError, match="is missing"):
        ShardDataset(path)
    with pytest.raises(UserError, match="is missing"):
        ShardDataset(tmp_path / "nothing.json")


def test_a_verification_set_of_the_same_name_is_not_written_over(whole, tmp_path):
    (tmp_path / "heldout.bin").write_bytes(b"pairs")
    with pytest.raises(UserError, match=r"heldout\.bin"):
        write_subset(tmp_path / "heldout.json", whole, np.arange(5))
    assert [path.name for path in tmp_path.iterdir()] == ["heldout.bin"] and (
        tmp_path / "heldout.bin"
    ).read_bytes() == b"pairs"
    for count in (3, 5):  # its own it replaces
        assert len(ShardDataset(write_subset(tmp_path / "few.json", whole, np.arange(count)))) == count


def test_the_tool(folder, tmp_path):
    command = [sys.executable, "tools/make_subset.py", str(folder), str(tmp_path / "s.json")]
    done = subprocess.run([*command, "--fraction", "0.1", "--shots", "1"], capture_output=True, text=True, check=True)
    assert "4 images of 4 identities" in done.stdout
    wrong = subprocess.run([*command, "--fraction", "2"], capture_output=True, text=True, check=False)
    assert (
        wrong.returncode == 2
        and wrong.stderr.startswith("make_subset: error: fraction=2.0")
        and wrong.stderr.count("\n") == 1
    )
    (tmp_path / "latin.txt").write_bytes(b"Andr\xe9\n")
    wrong = subprocess.run(
        [*command, "--identities", str(tmp_path / "latin.txt")], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2 and "UTF-8" in wrong.stderr and wrong.stderr.count("\n") == 1


def test_cache_copies_within_its_bound_and_changes_nothing(folder, tmp_path):
    plain = ShardDataset(folder)
    sizes = [shard.size for shard in plain.manifest.shards]
    dataset = ShardDataset(folder, files=cached(tmp_path, 2 * max(sizes)))
    cache = dataset.files
    other = tmp_path / "another_dataset" / "000007.tar"  # left by an earlier run on other data: counts, and goes first
    other.parent.mkdir()
    other.write_bytes(bytes(max(sizes)))
    os.utime(other, (0, 0))
    for _ in range(3):
        for sample in range(0, 200, 7):
            assert dataset.read(sample) == plain.read(sample)  # while it is copied or deleted
    for sample in range(0, 200, 7):
        assert dataset.read(sample) == plain.read(sample)
        cache._wanted.join()  # nothing is being copied now
        assert 0 < sum(path.stat().st_size for path in cache.folder.glob("*.tar")) <= 2 * max(sizes)
    cache.close()
    assert not other.exists()
    assert not list(cache.folder.glob("*.tmp"))
    # what a killed rank left goes, what another rank is writing stays
    (cache.folder / "000000.1.tmp").touch()
    (cache.folder / "000000.2.tmp").touch()
    os.utime(cache.folder / "000000.1.tmp", (0, 0))
    # a copy that is not whole is not used
    again = ShardDataset(folder, files=cached(tmp_path, 2 * max(sizes)))
    copy = next(iter(cache.folder.glob("*.tar")))
    copy.write_bytes(b"")
    assert again.read(0) == plain.read(0) and again.read(199) == plain.read(199)
    assert not (cache.folder / "000000.1.tmp").exists() and (cache.folder / "000000.2.tmp").exists()


def test_a_copy_that_fails_while_it_is_read_is_left_for_the_original(folder, tmp_path, monkeypatch):
    messages: list[str] = []
    plain = ShardDataset(folder)
    dataset = ShardDataset(folder, warn=messages.append, pause=60, files=cached(tmp_path, 1 << 30))
    cache = dataset.files
    for sample in (0, 199):
        dataset.read(sample)
    cache._wanted.join()
    for shard in range(len(dataset.manifest.shards)):
        dataset.forget(shard)  # the next read opens the copies
    pread, broken = os.pread, cache.folder / "000000.tar"

    def failing(descriptor, length, offset):
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(broken)):
            raise OSError(errno.EIO, "Input/output error")
        return pread(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", failing)
    assert dataset.read_batch(dataset.records(np.arange(200))) == [plain.read(sample)[0] for sample in range(200)]
    # and one that lost its end after it was opened
    last = sorted(cache.folder.glob("*.tar"))[-1]
    os.truncate(last, 1)
    assert dataset.read(199) == plain.read(199)
    cache._wanted.join()
    assert not broken.exists() and not last.exists()  # nor copied again by this rank
    assert len(messages) == 2 and all(part in messages[0] for part in (str(broken), "shard 0", "Input/output error"))
    assert "(cut short)" in messages[1]
    cache.close()
    with pytest.raises(UserError, match=r"dataset\.json"):
        ShardDataset(folder, files=cached(folder / "dataset.json", 1))


def test_a_manifest_under_a_linked_folder_finds_its_dataset(whole, tmp_path):
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "near").symlink_to(tmp_path / "far" / "away")
    path = write_subset(tmp_path / "near" / "some.json", whole, np.arange(5))
    assert len(ShardDataset(path)) == 5
