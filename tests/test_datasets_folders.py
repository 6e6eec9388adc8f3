"""Folders and zips: everything in them is packed or counted."""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path

import pytest

from lvtrain.datasets.packing import PackOptions, pack
from lvtrain.errors import UserError
from tests.messy_sources import jpeg, packed, people


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
        "file that is not an image by its suffix": 1,
        "hidden file": 6,
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
