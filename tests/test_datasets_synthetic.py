"""Generated identities: pure functions of the seed, readable by others, a real problem for raw pixels, pairs in insightface's arrangement."""

import io
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from lvtrain import randomness
from lvtrain.data.index import open_index, read_labels, read_manifest
from lvtrain.datasets.synthetic import DIFFICULTIES, heldout_pairs, render_face, write_faces
from lvtrain.datasets.synthetic.faces import IMAGE_NAMES, image_numbers
from lvtrain.errors import UserError

NORMAL = DIFFICULTIES["normal"]


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    return folder, write_faces(folder, identities=7, images=5, heldout=3, seed=11, workers=1)


def test_same_bytes_for_any_number_of_processes(written, tmp_path):
    folder, _ = written
    write_faces(tmp_path, identities=7, images=5, heldout=3, seed=11, workers=2)
    assert files_of(tmp_path) == files_of(folder)


def test_an_identity_does_not_depend_on_how_many_there_are():
    first = render_face(3, 40, 2, NORMAL)
    assert first.shape == (112, 112, 3) and first.dtype == np.uint8
    assert (first == render_face(3, 40, 2, NORMAL)).all()
    for other in (render_face(3, 41, 2, NORMAL), render_face(3, 40, 3, NORMAL), render_face(4, 40, 2, NORMAL)):
        assert np.abs(first.astype(int) - other).mean() > 5


def test_index_points_at_the_images(written):
    folder, result = written
    manifest = read_manifest(folder / "train")
    assert manifest == result.train and manifest.samples == 35 and manifest.num_classes == 7
    index = open_index(folder / "train", manifest)
    shard = (folder / "train" / manifest.shards[0].name).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
        members = {member.name: member for member in tar}
    for record, name in zip(index, [name for name in members if name.endswith(".jpg")]):
        data = shard[int(record["offset"]) : int(record["offset"]) + int(record["length"])]
        assert data == shard[members[name].offset_data : members[name].offset_data + members[name].size]
        assert Image.open(io.BytesIO(data)).size == (112, 112)
        assert int(name.split("_")[0]) == record["label"]
    assert len(read_labels(folder / "heldout")) == 3
    assert np.bincount(index["label"]).tolist() == [5] * 7
    assert (np.diff(index["label"].astype(int)) != 0).mean() > 0.5  # shuffled, not sorted by identity


def test_the_webdataset_library_reads_the_shard(written):
    folder, _ = written
    shard = folder / "train" / "shards" / "000000.tar"
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False).decode("rgb8"))
    assert len(samples) == 35
    assert {sample["cls"] for sample in samples} == set(range(7)) and samples[0]["jpg"].shape == (112, 112, 3)


def test_training_and_held_out_people_differ(written):
    _, result = written
    assert result.train.provenance["identities"] == [0, 7] and result.heldout.provenance["identities"] == [7, 10]
    assert len({image for person in result.heldout_images for image in person}) == 15


def test_pairs_are_ten_balanced_folds_without_repeats():
    pairs, same = heldout_pairs(identities=9, images=6, pairs=200, seed=1)
    assert pairs.shape == (200, 2, 2) and same.dtype == bool
    assert (same.reshape(10, 20).sum(axis=1) == 10).all()
    assert ((pairs[:, 0, 0] == pairs[:, 1, 0]) == same).all()
    assert (pairs[same][:, 0, 1] != pairs[same][:, 1, 1]).all()
    assert len({tuple(sorted(map(tuple, pair))) for pair in pairs.tolist()}) == 200
    assert pairs[..., 0].max() < 9 and pairs[..., 1].max() < 6


def test_raw_pixels_do_not_solve_it():
    """Cosine of raw pixels stays below 65% even when the threshold is chosen on the pairs themselves."""
    pairs, same = heldout_pairs(identities=30, images=8, pairs=600, seed=0)
    pixels = np.stack(
        [[render_face(0, 500 + person, image, NORMAL).ravel() for image in range(8)] for person in range(30)]
    ).astype(np.float32)
    pixels = pixels / 127.5 - 1
    pixels /= np.linalg.norm(pixels, axis=-1, keepdims=True)
    left, right = (pixels[pairs[:, side, 0], pairs[:, side, 1]] for side in (0, 1))
    cosine = (left * right).sum(axis=1)
    best = max(((cosine > threshold) == same).mean() for threshold in np.linspace(-1, 1, 401))
    assert 0.5 <= best < 0.65


@pytest.mark.parametrize("difficulty", ["normal", "hard"])
def test_the_numbers_of_the_first_difficulties_stay(difficulty):
    numbers = image_numbers(3, 40, 2, DIFFICULTIES[difficulty])
    assert list(numbers) == list(IMAGE_NAMES)
    assert list(numbers.values()) == randomness.uniform(3, "synthetic/image", 40, 2, np.arange(len(numbers))).tolist()
    assert set(DIFFICULTIES[difficulty].described()) == {"spread", "nuisance", "light"}  # as manifests have it


def test_an_album_has_one_backdrop_shirt_and_lamp_and_calibrated_cameras():
    album, pool = DIFFICULTIES["album"], IMAGE_NAMES[IMAGE_NAMES.index("back hue") : IMAGE_NAMES.index("glasses worn")]
    drawn = [image_numbers(seed, identity, 0, album) for seed in (0, 1) for identity in range(300)]
    for name in (*pool, "light x", "light y", "light strength"):
        assert len({numbers[name] for numbers in drawn}) == 1, name
    for name, (low, high) in album.ranges.items():
        values = np.array([numbers[name] for numbers in drawn])
        assert (
            low <= values.min()
            and values.max() <= high
            and values.std() == pytest.approx((high - low) / 12**0.5, rel=0.1)
        )
    assert all(numbers["occlusion"] > 0.25 and numbers["saturation"] > 0.1 for numbers in drawn)


def test_one_image_of_each_identity(tmp_path):
    result = write_faces(tmp_path, identities=5, images=1, heldout=3, seed=11, difficulty="album", workers=1)
    assert (result.train.samples, result.train.num_classes) == (5, 5)
    assert [len(person) for person in result.heldout_images] == [2, 2, 2]
    assert result.train.provenance["difficulty"]["name"] == "album"


@pytest.mark.parametrize(
    "bad", [{"identities": 0}, {"images": 0}, {"heldout_images": 1}, {"heldout": 1}, {"difficulty": "impossible"}]
)
def test_bad_counts_are_one_line(tmp_path, bad):
    arguments = {"identities": 2, "images": 2, "heldout": 2, "seed": 0, **bad}
    with pytest.raises(UserError) as error:
        write_faces(tmp_path, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("count", [0, 30, 100000])
def test_impossible_pair_counts_are_refused(count):
    with pytest.raises(UserError, match="--pairs"):
        heldout_pairs(identities=3, images=4, pairs=count, seed=0)
