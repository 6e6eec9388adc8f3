"""tools/verify_dataset.py: every injected fault is found and named, and a sound dataset is called sound."""

import errno
import json
import re
import shutil
import tarfile

import numpy as np
import pytest
from typer.testing import CliRunner

from lvtrain.data.index import RECORD, file_sha256
from lvtrain.data.shards import ShardDataset
from lvtrain.datasets import contact_sheet
from lvtrain.datasets.packing import PackOptions, pack
from lvtrain.datasets.synthetic import DIFFICULTIES, render_face
from lvtrain.datasets.synthetic.dataset import encode_face
from lvtrain.datasets.verify import verify
from lvtrain.errors import UserError


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    for person in range(3):
        (folder / "src" / f"p{person}").mkdir(parents=True)
        for image in range(5):
            (folder / "src" / f"p{person}" / f"{image}.jpg").write_bytes(
                encode_face(3, person, image, DIFFICULTIES["normal"])
            )
    pack(folder / "src", folder / "sound", PackOptions("folder", samples_per_shard=6))
    return folder / "sound"


@pytest.fixture
def dataset(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "set")
    return tmp_path / "set"


def kinds(folder, full):
    return {fault.kind for fault in verify(folder, full=full).faults}


def index_of(folder):
    return np.memmap(folder / "index.bin", dtype=RECORD, mode="r+", offset=64)


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x40
    path.write_bytes(data)


def test_sound(sound):
    for full in (False, True):
        verdict = verify(sound, full=full, workers=2 if full else 1)
        assert (verdict.faults, verdict.notes, verdict.samples, verdict.identities, verdict.shards) == (
            [],
            [],
            15,
            3,
            3,
        )


def test_flipped_byte_in_an_image(dataset):
    record = index_of(dataset)[8]
    assert record["shard"] == 1
    flip(dataset / "shards" / "000001.tar", int(record["offset"]) + 700)
    assert kinds(dataset, full=False) == set()
    faults = verify(dataset, full=True).faults
    assert faults[0].kind == "changed-shard" and faults[0].where.endswith("000001.tar")


def test_flipped_byte_in_an_image_header_names_the_sample(dataset):
    flip(dataset / "shards" / "000001.tar", int(index_of(dataset)[8]["offset"]))
    faults = {fault.kind: fault for fault in verify(dataset, full=True).faults}
    assert set(faults) == {"changed-shard", "bad-image"} and "sample 8" in faults["bad-image"].where


def test_cut_tar(dataset):
    path = dataset / "shards" / "000002.tar"
    path.write_bytes(path.read_bytes()[:9000])
    assert kinds(dataset, full=False) == {"cut-shard"}
    full = verify(dataset, full=True).faults
    assert {"cut-shard", "changed-shard", "damaged-tar"} <= {fault.kind for fault in full}
    assert all("000002.tar" in fault.where for fault in full)


def test_swapped_labels_in_the_index(dataset):
    index = index_of(dataset)
    first, second = 1, int(np.flatnonzero(index["label"] != index["label"][1])[0])
    index["label"][[first, second]] = index["label"][[second, first]]
    index.flush()
    assert kinds(dataset, full=False) == {"stale-index"}
    swapped = {fault.where for fault in verify(dataset, full=True).faults if fault.kind == "swapped-label"}
    assert {int(re.search(r"sample (\d+)", where)[1]) for where in swapped} == {first, second}


def test_swapped_label_in_the_tar(dataset):
    path = dataset / "shards" / "000000.tar"
    with tarfile.open(path) as tar:
        member = [member for member in tar if member.name.endswith(".cls")][2]
    data = bytearray(path.read_bytes())
    data[member.offset_data] = ord("0") + (data[member.offset_data] - ord("0") + 1) % 3
    path.write_bytes(data)
    faults = {fault.kind: fault for fault in verify(dataset, full=True).faults}
    assert set(faults) == {"changed-shard", "swapped-label"} and "sample 2 " in faults["swapped-label"].where


def test_missing_shard(dataset):
    (dataset / "shards" / "000001.tar").unlink()
    for full in (False, True):
        faults = verify(dataset, full=full).faults
        assert [(fault.kind, fault.where.endswith("000001.tar")) for fault in faults] == [("missing-shard", True)]


def test_stale_index(dataset, sound, tmp_path):
    pack(sound, tmp_path / "other", PackOptions("webdataset", samples_per_shard=6, seed=5))
    shutil.copy(tmp_path / "other" / "index.bin", dataset / "index.bin")
    assert kinds(dataset, full=False) == {"stale-index"}
    with pytest.raises(UserError, match=r"index\.bin"):
        ShardDataset(dataset)
    assert "stale-index" in kinds(dataset, full=True)
    (dataset / "index.bin").write_bytes((sound / "index.bin").read_bytes()[:-20])
    assert kinds(dataset, full=False) == {"stale-index"}
    (dataset / "index.bin").unlink()
    assert kinds(dataset, full=True) == {"stale-index"}


def test_shards_exchanged(dataset):
    one, two = dataset / "shards" / "000000.tar", dataset / "shards" / "000001.tar"
    one.rename(dataset / "x")
    two.rename(one)
    (dataset / "x").rename(two)
    assert {"changed-shard", "stale-index"} <= kinds(dataset, full=True)


def test_bad_label_label_map_and_manifest(dataset):
    index = index_of(dataset)
    index["label"][4] = 77
    index.flush()
    assert kinds(dataset, full=False) == {"bad-label", "stale-index"}
    (dataset / "labels.txt").write_text("a\nb\n")
    assert "label-map" in kinds(dataset, full=False)
    body = json.loads((dataset / "dataset.json").read_text())
    body["shards"][0]["samples"] -= 1
    (dataset / "dataset.json").write_text(json.dumps(body))
    assert "manifest" in kinds(dataset, full=False)
    (dataset / "dataset.json").write_text("{")
    assert kinds(dataset, full=False) == {"manifest"}
    (fault,) = verify(dataset / "nowhere").faults
    assert str(fault).startswith(f"manifest: {dataset}/nowhere/dataset.json: ") and str(fault).count("nowhere") == 1


def test_a_shard_that_cannot_be_read_hides_no_other_fault(dataset, monkeypatch):
    from lvtrain.datasets import verify as module

    def failing(path):
        if path.name == "000000.tar":
            raise OSError(errno.EIO, "Input/output error")
        return file_sha256(path)

    monkeypatch.setattr(module, "file_sha256", failing)
    flip(dataset / "shards" / "000002.tar", 600)
    faults = verify(dataset, full=True).faults
    assert [(fault.kind, fault.where[-10:]) for fault in faults[:2]] == [
        ("unreadable-shard", "000000.tar"),
        ("changed-shard", "000002.tar"),
    ]


def test_notes_name_what_is_unread_or_empty(dataset):
    (dataset / "shards" / "000009.tar").write_bytes(b"")
    verdict = verify(dataset)
    assert not verdict.faults and "000009.tar" in verdict.notes[0]


def test_command_line(dataset, tmp_path):
    import typer

    from tools.verify_dataset import main

    app = typer.Typer()
    app.command()(main)
    good = CliRunner().invoke(app, [str(dataset), "--full", "--workers", "1", "--sheet", str(tmp_path / "sheet.png")])
    assert good.exit_code == 0 and "15 samples" in good.output and (tmp_path / "sheet.png").stat().st_size > 10000
    (dataset / "shards" / "000001.tar").unlink()
    bad = CliRunner().invoke(app, [str(dataset)])
    assert bad.exit_code == 2 and "missing-shard" in bad.output and "Traceback" not in bad.output
    nobody = CliRunner().invoke(app, [str(dataset), "--full", "--workers", "0"])
    assert nobody.exit_code == 2 and "--workers" in nobody.output


def test_colour_order_is_guessed():
    faces = [render_face(0, person, 0, DIFFICULTIES["normal"]) for person in range(40)]
    assert contact_sheet.colour_order(contact_sheet.channel_means(faces)).startswith("RGB")
    assert contact_sheet.colour_order(contact_sheet.channel_means([face[:, :, ::-1] for face in faces])).startswith(
        "BGR?"
    )
    grey = [np.repeat(face[:, :, :1], 3, axis=2) for face in faces]
    assert contact_sheet.colour_order(contact_sheet.channel_means([*grey, None])).startswith("undecided")


def test_names_without_a_font_are_escaped_and_never_boxes(tmp_path, monkeypatch):
    """What is drawn is compared with a sheet whose names are the escapes themselves."""
    from matplotlib import font_manager

    name = "王伟 김"
    fonts = font_manager.findSystemFonts()
    found = contact_sheet.fonts_for([name, "Müller", "plain"])
    assert "plain" not in found and (found["Müller"] is None or str(found["Müller"]) in fonts)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    picture = encode_face(1, 0, 0, DIFFICULTIES["normal"])
    contact_sheet.draw([(name, [picture])], "title", tmp_path / "a.png")
    escaped = r"\u738b\u4f1f \uae40"
    contact_sheet.draw([(escaped, [picture])], "title", tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
