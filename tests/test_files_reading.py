"""Readers of files that may hold anything: JSON, rows of a .jsonl, lines of a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvtrain.files.reading import parse_json, read_lines, read_records

VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_infinity=False, allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_json_is_read_as_the_library_reads_it(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize("text", ["[" * 100_000, '{"step": 1e999}', "-1e400", "{", "", b"\xff"])
def test_other_text_is_one_kind_of_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


@given(st.lists(VALUES | st.dictionaries(st.just("step"), VALUES), max_size=6), st.binary(max_size=8))
def test_rows_are_objects_with_their_key_and_the_rest_is_counted(values: list[Any], cut: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.jsonl")
        garbage = b"\xff" + cut.replace(b"\n", b"")  # never JSON
        path.write_bytes(b"".join(json.dumps(value).encode() + b"\n" for value in values) + garbage)
        wanted = [value for value in values if isinstance(value, dict) and type(value.get("step")) is int]
        assert read_records(path, "step", int) == (wanted, len(values) - len(wanted) + 1)
        assert read_records(path.with_name("none"), "step", int) == ([], 0)


def test_lines_end_with_line_feeds_only(tmp_path: Path) -> None:
    names = ["a\x85b", "c\u2028d", "e\x0bf", " g", "h "]
    for mark in (b"", b"\xef\xbb\xbf"):
        for end in ("\n", "\r\n"):
            (tmp_path / "x").write_bytes(mark + end.join(names).encode())
            assert read_lines(tmp_path / "x") == names
