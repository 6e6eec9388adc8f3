"""Tars: a label never goes to another's image, and nothing is lost without being counted."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lvtrain.data.shards import ShardDataset
from lvtrain.datasets.packing import PackOptions, pack
from lvtrain.errors import UserError
from tests.messy_sources import add, jpeg, listed, packed, people

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
    assert people(tmp_path / "out") == {"ann": 4, "ben": 1}  # a hard link is the image that it links to
    assert report["reconciliation"]["skipped"] == {
        "hidden file of a tar": 4,
        "image .mask.png of a sample with .jpg": 4,
        "sample without an image that its suffix identifies": 2,
    }
    assert report["left_out"]["image .mask.png of a sample with .jpg"]["names"][0] == "0.tar: x0.mask.png"
    assert report["ignored"]["member .json of a sample"]["count"] == 4
    masks = packed("webdataset", tmp_path / "src", tmp_path / "masks", image="mask.png")
    assert masks["images_written"] == 4


@pytest.mark.parametrize("damage", ["header", "cut at a member", "cut inside", "two joined"])
def test_a_tar_that_tarfile_ends_early_is_refused(tmp_path: Path, damage: str) -> None:
    """Tarfile stops without an error at a damaged header, at a missing end, and before a second archive."""
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


def test_archives_that_are_not_read_are_counted(tmp_path: Path) -> None:
    (tmp_path / "src" / ".old").mkdir(parents=True)
    for name in ("0.TAR", "._0.tar", "1.tar.gz", "2.tar.part", "3.tgz"):
        with tarfile.open(tmp_path / "src" / name, "w") as tar:
            add(tar, "a.jpg", jpeg(0))
            add(tar, "a.cls", b"ann")
    report = packed("webdataset", tmp_path / "src", tmp_path / "out")
    assert report["reconciliation"]["packed"] == 1 and sum(report["reconciliation"]["skipped"].values()) == 4


def test_masks_do_not_stand_in_for_images_that_are_missing(tmp_path: Path) -> None:
    """Found by looking at a messy import: 3 images and 3 masks are not the 6 images that were announced."""
    (tmp_path / "src").mkdir()
    with tarfile.open(tmp_path / "src" / "0.tar", "w") as tar:
        for number in range(3):
            add(tar, f"{number}.jpg", jpeg(number))
            add(tar, f"{number}.mask.png", jpeg(10 + number))
            add(tar, f"{number}.cls", b"ann")
    (tmp_path / "src" / "0_stats.json").write_text('{"successes": 6}')
    total = packed("webdataset", tmp_path / "src", tmp_path / "out")["reconciliation"]
    assert (total["announced"], total["unannounced"], total["packed"]) == (6, 3, 3)
    assert total["refused"] == {"announced but not found": 3} and sum(total["skipped"].values()) == 3
