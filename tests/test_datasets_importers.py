"""Messy sources of every kind: each image gets its own label or is counted, and the sum at the end adds up.

Every image is told apart by its bytes, so that a label given to another's image is seen.
"""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lvtrain.data.shards import ShardDataset
from lvtrain.datasets import recordio
from lvtrain.datasets.catalogue import Catalogue, CatalogueWriter
from lvtrain.datasets.importer import open_importer
from lvtrain.datasets.packing import PackOptions, Policies, pack
from lvtrain.errors import UserError

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


# ------------------------------------------------------------------------------------------------------------------------ tars

SUFFIXES = ("jpg", "png", "mask.png", "cls", "json", "txt", "gif")
MEMBERS = st.lists(
    st.tuples(st.sampled_from(["a", "b", "d/a", "._a"]), st.sampled_from(SUFFIXES)), min_size=1, max_size=14
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(MEMBERS)
def test_no_order_of_members_gives_an_image_anothers_label(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, str]]
) -> None:
    """Any order, any repetition: members of one key between two other keys are one stretch, and a label never leaves its stretch."""
    folder = tmp_path_factory.mktemp("tar")
    stretch, before = 0, None
    written: dict[bytes, tuple[int, str]] = {}
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number, (key, suffix) in enumerate(members):
            if not key.startswith("._") and key != before:
                stretch, before = stretch + 1, key
            body = f"image {number}".encode()
            if suffix == "cls":
                body = f"s{stretch}-{number}".encode()
            elif suffix == "json":
                body = json.dumps({"label": f"s{stretch}-{number}"} if number % 2 else {"caption": "x"}).encode()
            else:
                written[body] = (stretch, suffix)
            add(tar, f"{key}.{suffix}", body)
    try:
        images, out = listed("webdataset", folder, folder / "scratch")
    except UserError:
        return  # nothing that could be packed
    for label, data in images:
        stretch, suffix = written[data]
        assert str(label).startswith(f"s{stretch}-")
        assert suffix in ("jpg", "png", "mask.png")
    assert len({data for _, data in images}) == len(images)
    of_images = sum(suffix in ("jpg", "png", "mask.png") and not key.startswith("._") for key, suffix in members)
    beside = sum(tally.count for reason, tally in out.ledger.left_out.items() if reason.startswith("image"))
    without = out.ledger.unlabelled.count
    assert of_images == len(images) + beside + without


def test_a_key_that_comes_twice_keeps_its_own_label(tmp_path: Path) -> None:
    """webdataset#157: the label left over from one sample went to the next image."""
    (tmp_path / "src").mkdir()
    with tarfile.open(tmp_path / "src" / "0.tar", "w") as tar:
        for number in range(18):
            key = f"k{number // 2}"
            add(tar, f"{key}.jpg", jpeg(number))
            add(tar, f"{key}.cls", f"p{number}".encode())
            add(tar, f"{key}.json", json.dumps({"label": "wrong", "width": 112}).encode())
    packed("webdataset", tmp_path / "src", tmp_path / "out")
    dataset = ShardDataset(tmp_path / "out")
    names = dataset.label_names()
    assert {dataset.read(sample)[0]: names[dataset.read(sample)[1]] for sample in range(18)} == {
        jpeg(number): f"p{number}" for number in range(18)
    }


def test_the_plain_suffix_wins_and_the_rest_is_counted(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    with tarfile.open(tmp_path / "src" / "0.tar", "w") as tar:
        for number in range(4):
            add(tar, f"._x{number}.jpg", b"mac")
            add(tar, f"x{number}.mask.png", jpeg(500 + number))
            add(tar, f"x{number}.jpg", jpeg(number))
            add(tar, f"x{number}.cls", b"ann")
            add(tar, f"x{number}.json", b'{"caption": "of no label"}')
        link = tarfile.TarInfo("y.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "x0.jpg"
        tar.addfile(link)
        add(tar, "y.cls", b"ben")
        add(tar, "z.cls", b"nobody")
        add(tar, "z2.cls", b"nobody")
    report = packed("webdataset", tmp_path / "src", tmp_path / "out")
    assert people(tmp_path / "out") == {"ann": 4, "ben": 1}  # a hard link is the image it stands for
    assert report["reconciliation"]["skipped"] == {
        "hidden file of a tar": 4,
        "image .mask.png beside .jpg of a sample": 4,
        "sample without an image that is told apart by its suffix": 2,
    }
    assert report["left_out"]["image .mask.png beside .jpg of a sample"]["names"][0] == "0.tar: x0.mask.png"
    assert report["ignored"]["member .json of a sample"]["count"] == 4
    masks = packed("webdataset", tmp_path / "src", tmp_path / "masks", image="mask.png")
    assert masks["images_written"] == 4


@pytest.mark.parametrize("damage", ["header", "cut at a member", "cut inside", "two joined"])
def test_a_tar_that_tarfile_ends_early_is_refused(tmp_path: Path, damage: str) -> None:
    """tarfile stops without an error at a damaged header, at a missing end, and before a second archive."""
    (tmp_path / "src").mkdir()
    path = tmp_path / "src" / "0.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(6):
            add(tar, f"{number}.jpg", jpeg(number))
            add(tar, f"{number}.cls", b"ann")
    with tarfile.open(path) as tar:
        at = tar.getmembers()[6].offset
    whole = path.read_bytes()
    content = {
        "header": whole[:at] + b"\xff" * 100 + whole[at + 100 :],
        "cut at a member": whole[:at],
        "cut inside": whole[: at + 700],
        "two joined": whole + whole,
    }[damage]
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"0\.tar"):
        pack(tmp_path / "src", tmp_path / "out", PackOptions("webdataset"))
    assert not (tmp_path / "out").exists()
    if damage in ("cut at a member", "two joined"):
        packed("webdataset", tmp_path / "src", tmp_path / "out")


def test_what_manifests_beside_tars_say_is_compared(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "src" / f"{shard:05d}.tar", "w") as tar:
            for number in range(3):
                add(tar, f"{number}.jpg", jpeg(10 * shard + number))
                add(tar, f"{number}.cls", b"%d" % shard)
    (tmp_path / "src" / "00000_stats.json").write_text('{"successes": 5}')
    index = {"shardlist": [{"url": "00001.tar", "nsamples": 3}, {"url": "00002.tar", "nsamples": 4}]}
    (tmp_path / "src" / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="mismatch"):
        pack(tmp_path / "src", tmp_path / "out", PackOptions("webdataset"))
    report = packed("webdataset", tmp_path / "src", tmp_path / "out")
    assert report["reconciliation"]["announced"] == 12 and report["reconciliation"]["packed"] == 6
    assert report["reconciliation"]["refused"] == {"announced but not found": 6}
    assert report["troubles"]["mismatch"]["count"] == 2


# ------------------------------------------------------------------------------------------------------------- folders and zips


def test_a_messy_folder_adds_up(tmp_path: Path) -> None:
    source = tmp_path / "src"
    for person in ("ann", "ben"):
        (source / person / "@eaDir").mkdir(parents=True)
        for number in range(3):
            (source / person / f"{number}.jpg").write_bytes(jpeg(number + 100 * (person == "ben")))
            (source / person / f"._{number}.jpg").write_bytes(b"mac")
        (source / person / "@eaDir" / "thumb.jpg").write_bytes(jpeg(7))
    (source / "@eaDir").mkdir()
    (source / "@eaDir" / "a.jpg").write_bytes(jpeg(8))
    (source / "ann" / "old.gif").write_bytes(b"GIF89a")
    (source / "ann" / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n")
    os.mkfifo(source / "ben" / "pipe.jpg")
    (source / "readme.txt").write_text("x")
    report = packed("folder", source, tmp_path / "out")
    assert people(tmp_path / "out") == {"ann": 3, "ben": 3}
    assert report["reconciliation"]["line"].startswith("announced 19 = packed 6 + skipped 11")
    assert report["reconciliation"]["skipped"] == {
        "file in a hidden or system folder": 3,
        "file that is not an image by its suffix": 7,
        "file beside the identity folders": 1,
    }
    assert report["reconciliation"]["refused"] == {"undecodable": 2}


def test_parts_above_identities_need_their_level(tmp_path: Path) -> None:
    for part, person, number in (("train", "ann", 0), ("train", "ben", 1), ("val", "ann", 2)):
        (tmp_path / "src" / part / person).mkdir(parents=True)
        (tmp_path / "src" / part / person / f"{number}.jpg").write_bytes(jpeg(number))
    with pytest.raises(UserError, match="--option level=2"):
        pack(tmp_path / "src", tmp_path / "out", PackOptions("folder"))
    packed("folder", tmp_path / "src", tmp_path / "two", level="2")
    assert people(tmp_path / "two") == {"ann": 2, "ben": 1}
    packed("folder", tmp_path / "src", tmp_path / "one", level=1)
    assert people(tmp_path / "one") == {"train": 2, "val": 1}


def test_a_zip_member_that_unpacks_without_end_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    with zipfile.ZipFile(tmp_path / "src" / "0_0.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for number in range(2):
            file.writestr(f"0_0_0000000/0_{number}.jpg", jpeg(number))
        file.writestr("0_0_0000000/0_2.jpg", bytes(80 << 20))
        file.writestr("__MACOSX/0_0_0000000/._0_0.jpg", b"x")
    data = bytearray((tmp_path / "src" / "0_0.zip").read_bytes())
    at = data.rindex(b"PK\1\2", 0, data.rindex(b"PK\1\2"))  # the large one lies about its size in the directory
    (tmp_path / "lying").mkdir()
    struct.pack_into("<I", data, at + 24, 1000)
    (tmp_path / "lying" / "0_0.zip").write_bytes(data)
    honest = packed("webface-zip", tmp_path / "src", tmp_path / "out")
    assert honest["reconciliation"]["line"].startswith("announced 4 = packed 2 + skipped 2")
    lying = packed("webface-zip", tmp_path / "lying", tmp_path / "out2")
    assert lying["reconciliation"]["refused"] == {"undecodable": 1}


# ------------------------------------------------------------------------------------------------------------------- RecordIO


def write_rec(folder: Path, images: int = 18, classes: int = 6) -> Path:
    """insightface's arrangement with `property`: three images an identity."""
    folder.mkdir()
    with recordio.RecordWriter(folder / "train.rec") as rec:
        rec.write(0, recordio.pack_record([images + 1, images + 1 + classes]))
        for key in range(1, images + 1):
            rec.write(key, recordio.pack_record((key - 1) * classes // images, jpeg(key)))
        for label in range(classes):
            rec.write(images + 1 + label, recordio.pack_record([1 + 3 * label, 4 + 3 * label]))
    (folder / "property").write_text(f"{classes},112,112\n")
    return folder / "train.rec"


@pytest.mark.parametrize("lines", [9, 19, 24])
def test_an_index_cut_at_a_line_is_noticed(tmp_path: Path, lines: int) -> None:
    index = write_rec(tmp_path / "src").with_suffix(".idx")
    index.write_text("".join(index.read_text().splitlines(keepends=True)[:lines]))
    with pytest.raises(UserError, match="announces"):
        pack(tmp_path / "src", tmp_path / "out", PackOptions("recordio"))
    report = packed("recordio", tmp_path / "src", tmp_path / "out")
    found = min(lines - 1, 18)
    assert report["reconciliation"]["announced"] == 18 and report["reconciliation"]["packed"] == found
    assert report["reconciliation"]["refused"] == ({"announced but not found": 18 - found} if found < 18 else {})


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_line_of_an_index_can_be_lost_or_changed_without_a_word(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("rec") / "src"
    index = write_rec(folder, images=6, classes=2).with_suffix(".idx")
    lines = index.read_text().splitlines(keepends=True)
    at = data.draw(st.integers(0, len(lines) - 1))
    key, offset = lines[at].split()
    change = data.draw(st.sampled_from(["drop", "again", "negative", "shift", "huge", "letters", "swap keys"]))
    lines[at : at + 1] = {
        "drop": [],
        "again": [lines[at]] * 2,
        "negative": [f"{key}\t-{offset or 4}\n"] if int(offset) else [f"-1\t{offset}\n"],
        "shift": [f"{key}\t{int(offset) + data.draw(st.integers(1, 64))}\n"],
        "huge": [f"{key}\t{1 << data.draw(st.integers(40, 70))}\n"],
        "letters": [f"{key}\tx{offset}\n"],
        "swap keys": [f"{int(key) + 1000}\t{offset}\n"],
    }[change]
    index.write_text("".join(lines))
    out = CatalogueWriter(folder.parent / "scratch")
    try:
        open_importer("recordio", folder, {}).scan(out)
    except UserError as error:
        assert "train." in str(error) and "\n" not in str(error)
        return
    assert out.ledger.mismatches.count


@pytest.mark.parametrize("number", [float("inf"), float("nan"), -3.0, 0.0])
def test_a_header_that_counts_nonsense_is_one_line(tmp_path: Path, number: float) -> None:
    rec = write_rec(tmp_path / "src")
    data = bytearray(rec.read_bytes())
    struct.pack_into("<f", data, 8 + 24, number)
    rec.write_bytes(data)
    with pytest.raises(UserError, match=r"train\.rec"):
        pack(tmp_path / "src", tmp_path / "out", PackOptions("recordio"))


# -------------------------------------------------------------------------------------------------------------------- Parquet


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


@settings(max_examples=15, deadline=None)
@given(st.lists(st.permutations(["ann", "ben", "cem", "dan", "eva", "fay"]), min_size=2, max_size=3))
def test_files_that_number_their_classes_differently_are_joined_by_name(
    tmp_path_factory: pytest.TempPathFactory, orders: list[list[str]]
) -> None:
    folder = tmp_path_factory.mktemp("parquet")
    expected = {}
    for part, names in enumerate(orders):
        write_table(folder / "src" / f"{part}.parquet", list(range(6)), names, first=10 * part)
        expected |= {jpeg(10 * part + number): name for number, name in enumerate(names)}
    images, out = listed("parquet", folder / "src", folder / "scratch")
    by_number = out.class_names
    assert {data: by_number.get(label, label) for label, data in images} == expected


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        ([0.0, float("nan"), 1.0, None], None),
        (["ann", "", "ben", None], None),
        ([0, -1, 1, None], None),
        ([b"ann", b"", b"ben", b" "], None),
    ],
)
def test_a_missing_label_is_nobody(tmp_path: Path, labels: list[Any], kind: Any) -> None:
    write_table(tmp_path / "src" / "0.parquet", labels, kind=kind)
    with pytest.raises(UserError, match="unlabelled"):
        pack(tmp_path / "src", tmp_path / "out", PackOptions("parquet"))
    report = packed("parquet", tmp_path / "src", tmp_path / "out")
    assert sorted(people(tmp_path / "out").values()) == [1, 1]
    assert report["reconciliation"]["refused"] == {"unlabelled": 2}


@pytest.mark.parametrize(
    "content", ["cut", "pointer", "labels of 2^63", "no magic", "one without names", "a label beyond the names"]
)
def test_a_damaged_table_is_one_line_that_names_it(tmp_path: Path, content: str) -> None:
    pa = pytest.importorskip("pyarrow")
    path = tmp_path / "src" / "0.parquet"
    write_table(path, [1, 2, 3])
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif content == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    elif content == "labels of 2^63":
        write_table(path, [1, 1 << 63], kind=pa.uint64())
    elif content == "no magic":
        path.write_bytes(b"x" * 5000)
    elif content == "one without names":
        write_table(tmp_path / "src" / "1.parquet", [0, 1], ["ann", "ben"])
    else:
        write_table(path, [0, 7], ["ann", "ben"])
    with pytest.raises(UserError, match=r"0\.parquet") as error:
        pack(tmp_path / "src", tmp_path / "out", PackOptions("parquet"))
    assert "\n" not in str(error.value)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["webdataset", "webface-zip", "recordio", "parquet"]), st.data())
def test_a_file_cut_or_changed_anywhere_is_one_line_or_adds_up(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    """Of 6 images, those that are not packed are counted, or the pack is refused in one line. No other exception."""
    folder = tmp_path_factory.mktemp("damage")
    source = folder / "src"
    if kind == "recordio":
        path = write_rec(source, images=6, classes=2)
    elif kind == "parquet":
        path = source / "0.parquet"
        write_table(path, [0, 0, 0, 1, 1, 1])
    elif kind == "webdataset":
        source.mkdir()
        path = source / "0.tar"
        with tarfile.open(path, "w") as tar:
            for number in range(6):
                add(tar, f"{number}.jpg", jpeg(number))
                add(tar, f"{number}.cls", b"%d" % (number // 3))
    else:
        source.mkdir()
        path = source / "0.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for number in range(6):
                file.writestr(f"0_0_000000{number // 3}/{number}.jpg", jpeg(number))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(1, len(content) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        report = pack(source, folder / "out", PackOptions(kind, size=None))
    except UserError as error:
        assert "\n" not in str(error)
        return
    total = report["reconciliation"]
    assert total["packed"] + sum(total["refused"].values()) + sum(total["skipped"].values()) >= 6


# ------------------------------------------------------------------------------------------------------------------- all kinds


@pytest.mark.parametrize("label", [(1 << 63) - 1, 1 << 40])
def test_kept_numbers_do_not_ask_for_billions_of_classes(tmp_path: Path, label: int) -> None:
    write_table(tmp_path / "src" / "0.parquet", [0, 1, label])
    packed("parquet", tmp_path / "src", tmp_path / "fixed")
    assert people(tmp_path / "fixed") == {"0": 1, "1": 1, str(label): 1}
    with pytest.raises(UserError, match="label-gap keep"):
        packed("parquet", tmp_path / "src", tmp_path / "kept", Policies(label_gap="keep"))


def test_two_names_that_print_alike_are_refused(tmp_path: Path) -> None:
    for number, name in enumerate((b"\xff", b"\\xff")):
        folder = os.path.join(os.fsencode(tmp_path / "src"), name)
        os.makedirs(folder)
        with open(os.path.join(folder, b"0.jpg"), "wb") as file:
            file.write(jpeg(number))
    with pytest.raises(UserError, match=r"xff"):
        packed("folder", tmp_path / "src", tmp_path / "out")


def test_archives_that_are_not_read_are_counted(tmp_path: Path) -> None:
    (tmp_path / "src" / ".old").mkdir(parents=True)
    for name in ("0.TAR", "._0.tar", "1.tar.gz", "2.tar.part", "3.tgz"):
        with tarfile.open(tmp_path / "src" / name, "w") as tar:
            add(tar, "a.jpg", jpeg(0))
            add(tar, "a.cls", b"ann")
    report = packed("webdataset", tmp_path / "src", tmp_path / "out")
    assert report["reconciliation"]["packed"] == 1 and sum(report["reconciliation"]["skipped"].values()) == 4
