"""Labels: bytes to identity is one-to-one. Generators compare with the rule written out here."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvtrain.datasets.labels import LabelReader
from lvtrain.errors import UserError

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12)


def read_all(files: list[bytes], **options: str) -> list | None:
    """Labels of a source, or None where it is refused as a whole."""
    reader = LabelReader(**options)
    try:
        return [reader.of_bytes(data, f"{number}.cls") for number, data in enumerate(files)]
    except UserError:
        return None


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=9), min_size=2, max_size=6))
def test_two_different_labels_are_never_one_identity(files: list[bytes]) -> None:
    """Of any bytes: refused, missing, or as many identities as there are different labels (a line's end is not part of a label)."""
    labels = read_all(files)
    if labels is not None:
        written = {
            data.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
            for data, label in zip(files, labels)
            if label is not None
        }
        if all(isinstance(label, int) for label in labels):
            written = {data.strip() if data.strip().isdigit() else data for data in written}
        assert len({label for label in labels if label is not None}) == len(written)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["<B", "<H", "<i", "<q"]), st.permutations(range(200)), st.booleans())
def test_binary_integers_are_recognised_or_refused(form: str, order: list[int], stated: bool) -> None:
    labels = read_all([struct.pack(form, number) for number in order], **({"form": "binary"} if stated else {}))
    if stated or form != "<B":  # the others hold a zero byte here, which no text has
        assert labels == order
    else:
        assert labels is None  # some of them look like text: nothing is guessed


@pytest.mark.parametrize("people", [9, 12])
def test_labels_9_to_13_are_not_white_space(people: int) -> None:
    """DALI#4839: `strip` would eat these bytes."""
    for form in ("<B", "<H", "<i", "<q"):
        assert read_all([struct.pack(form, number) for number in range(people)]) == list(range(people))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(NAMES, unique=True, min_size=2, max_size=8), st.sampled_from(["utf-8", "gbk", "euc-kr", "big5", "latin-1"])
)
def test_text_of_another_encoding_is_named_never_replaced(names: list[str], encoding: str) -> None:
    try:
        files = [name.encode(encoding) for name in names]
    except UnicodeEncodeError:
        return
    right, strict = read_all(files, encoding=encoding, form="text"), read_all(files)
    assert right is None or len(set(right) - {None}) == len(
        {name for name, label in zip(names, right) if label is not None}
    )
    assert strict is None or len(set(strict) - {None}) == sum(label is not None for label in strict)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("7", 7), ("7\n", 7), (" 7\r\n", 7), ("007", 7), ("-1", None), ("", None),
        ("+7", "+7"), ("7_0", "7_0"), ("٣", "٣"), ("７", "７"), ("²", "²"), ("1e3", "1e3"), ("ann ", "ann "), ("\ufeffann", "ann"),
    ],
)  # fmt: skip
def test_only_plain_ascii_digits_are_a_number(text: str, label: object) -> None:
    assert LabelReader().of_bytes(text.encode(), "x.cls") == label


@pytest.mark.parametrize("text", ["-2", "9223372036854775808", "1" * 5000, "a\nb", "a\0b", "\n", " "])
def test_impossible_text_is_refused_by_name(text: str) -> None:
    with pytest.raises(UserError, match=r"x\.cls"):
        LabelReader().of_bytes(text.encode(), "x.cls")


def test_one_number_in_two_spellings_is_refused() -> None:
    assert read_all([b"5", b"05"]) is None and read_all([b"05", b"06", b"05"]) == [5, 6, 5]


@pytest.mark.parametrize(
    ("value", "label"),
    [(3, 3), (3.0, 3), ("3", 3), ("ann", "ann"), (None, None), (float("nan"), None), ("", None), (-1, None)],
)
def test_values_of_json(value: object, label: object) -> None:
    assert LabelReader().of_json(json.dumps({"label": value}).encode(), "x.json") == label


@pytest.mark.parametrize(
    "text",
    [
        '{"label": true}', '{"label": 1.5}', '{"label": [1]}', '{"label": 1e300}', '{"label": 9223372036854775808}',
        '{"label": Infinity}', '{"label": -7}', '{"label": 1, "label": 2}', '{"label"', "[" * 100_000, "\ufffe",
    ],
)  # fmt: skip
def test_other_values_of_json_are_refused_by_name(text: str) -> None:
    with pytest.raises(UserError, match=r"x\.json"):
        LabelReader().of_json(text.encode(), "x.json")


def test_json_without_a_label_has_none_and_the_next_key_is_tried() -> None:
    assert LabelReader().of_json(b'{"caption": "x"}', "x.json") is None
    assert LabelReader().of_json(b'{"label": null, "cls": 4}', "x.json") == 4
    assert LabelReader().of_json(b"[1]", "x.json") is None
