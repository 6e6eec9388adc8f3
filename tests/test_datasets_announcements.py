"""RecordIO as a source: what header, index and property announce is compared with what is found."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvtrain.datasets.catalogue import CatalogueWriter
from lvtrain.datasets.importer import open_importer
from lvtrain.datasets.packing import PackOptions, pack
from lvtrain.errors import UserError
from tests.messy_sources import packed, write_rec


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
