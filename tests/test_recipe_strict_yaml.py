"""YAML and JSON: repeated keys, aliases that expand, and what is not text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lvtrain.recipe.strict_yaml import LARGEST_FILE, StrictError, parse_json, parse_yaml, read_small

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a: 1\nb: 2\na: 3", (1, 3)),
        ("x:\n  a: 1\n\n  b: 2\n  a: 3", (2, 5)),
        ("- {a: 1, b: 2}\n- {a: 1,\n   a: 2}", (2, 3)),
        ("'a': 1\na: 2", (1, 2)),
        ("x: &x {a: 1,\n  a: 2}\ny: *x", (1, 2)),
    ],
)
def test_a_repeated_key_names_both_lines(text: str, lines: tuple[int, int]) -> None:
    with pytest.raises(StrictError) as caught:
        parse_yaml(text)
    assert tuple(map(int, re.findall(r"line (\d+)", str(caught.value)))) == lines


def test_merged_keys_may_be_overridden() -> None:
    assert parse_yaml("x: &x {a: 1, b: 1}\ny: {<<: *x, a: 2}")["y"] == {"a": 2, "b": 1}


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]", "&a [*a, *a]", "a: &a {b: *a}"])
def test_aliases_are_bounded(text: str) -> None:
    with pytest.raises(StrictError, match="aliases"):
        parse_yaml(text)


@pytest.mark.parametrize("text", ["[" * 3000, "{a: " * 60 + "1" + "}" * 60, "- " * 3000])
def test_depth_is_bounded(text: str) -> None:
    with pytest.raises(StrictError, match="deep"):
        parse_yaml(text)


@pytest.mark.parametrize(
    "text", ["a: [1", "a: \x00", "!!python/object/apply:os.getcwd []", "a: 1\n---\nb: 2", "%A", "a: 2020-13-45"]
)
def test_what_is_not_a_plain_document(text: str) -> None:
    with pytest.raises(StrictError, match="not valid YAML"):
        parse_yaml(text)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"a": {"b": 1, "c": 1, "b": 1}}', "'b'"),
        ('[{"a": 1}, {"\\u0061": {}, "a": 2}]', "'a'"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ('{"a": 1}}', "not JSON"),
        ('{"a": 1e999}', "1e999"),
        ("[" * 100_000, "deep"),
    ],
)
def test_json(text: str, match: str) -> None:
    with pytest.raises(StrictError, match=match):
        parse_json(text)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(), below, max_size=4),
    max_leaves=20,
)


@given(VALUES, st.sampled_from([None, 1, "\t"]))
def test_any_json_is_read_as_the_json_module_reads_it(value: Any, indent: Any) -> None:
    assert parse_json(json.dumps(value, indent=indent)) == value


def test_json_keys_may_be_long() -> None:
    assert parse_json(json.dumps({"k" * 5000: 1})) == {"k" * 5000: 1}


@given(VALUES)
def test_any_yaml_is_read_as_pyyaml_reads_it(value: Any) -> None:
    text = yaml.safe_dump(value)
    assert parse_yaml(text) == yaml.safe_load(text)


def test_large_and_binary_files(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"#" * (LARGEST_FILE + 1))
    with pytest.raises(StrictError, match="bytes"):
        read_small(path)
    path.write_bytes(b"\xff\xfea")
    with pytest.raises(StrictError, match="UTF-8"):
        read_small(path)
