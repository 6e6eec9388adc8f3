"""Parquet: classes are joined by name, missing labels are counted, damage is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvtrain.datasets.packing import PackOptions, pack
from lvtrain.errors import UserError
from tests.messy_sources import jpeg, listed, packed, people, write_table


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
