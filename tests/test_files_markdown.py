"""Tables in Markdown are read by a parser as they were given."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvtrain.files.markdown import table

CELL = st.text(alphabet="ab1 |ü", max_size=6).map(str.strip)


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(CELL, min_size=n, max_size=n), min_size=1, max_size=4)))
def test_cells_are_those_given_and_columns_are_aligned(rows: list[list[str]]) -> None:
    lines = table(rows).split("\n")
    assert len({len(line) for line in lines}) == 1
    found = [[cell.strip().replace("\0", "|") for cell in line.replace("\\|", "\0").split("|")[1:-1]] for line in lines]
    assert [found[0], *found[2:]] == rows
    assert all(set(cell) <= {"-"} for cell in found[1])


def test_rows_have_one_length() -> None:
    with pytest.raises(ValueError):
        table([["a", "b"], ["c"]])
