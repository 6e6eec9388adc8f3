"""Any kind of source: damage anywhere, labels without bounds, names that print alike."""

from __future__ import annotations

import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvtrain.datasets.packing import PackOptions, Policies, pack
from lvtrain.errors import UserError
from tests.messy_sources import add, jpeg, packed, people, write_rec, write_table


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
