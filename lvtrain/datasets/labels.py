"""The one reader of labels.

Two rules: labels that are written differently are different identities, and a label that cannot be read is an error.

A label is an identity's number (int) or its name (str). Only plain ASCII digits are a number. A missing label (NaN, null,
empty, -1) is None.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from typing import Any, Literal

from lvtrain.errors import UserError

Label = int | str
Form = Literal["auto", "text", "binary"]
LARGEST = (1 << 63) - 1
JSON_KEYS = ("label", "cls", "class")
MAX_TEXT, MAX_JSON = 1 << 16, 1 << 24  # bytes of a label, of a JSON that holds one
_WIDTHS = (1, 2, 4, 8)
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


class LabelReader:
    """Reads the labels of one source.

    It remembers their form, because one file alone may be ambiguous: a byte 53 is also the text `5`.

    Args:
        encoding: of labels that are text; decoded strictly.
        form: what label files hold: `text`, or `binary`, a little-endian integer of 1, 2, 4 or 8 bytes. `auto` recognises
            integers by bytes that no text has, and refuses a source where both seem to occur.
    """

    def __init__(self, encoding: str = "utf-8", form: Form = "auto") -> None:
        try:
            codecs.lookup(encoding)
        except LookupError:
            raise UserError(f"encoding {encoding!r} is unknown; give one that Python knows, such as gbk") from None
        self.encoding, self.form = encoding, form
        self._seen: tuple[str, str] | None = None  # the form of the first label, and where it was
        self._spelled: dict[int, str] = {}

    def of_bytes(self, data: bytes, where: str) -> Label | None:
        """The label in the bytes of a file.

        Raises:
            UserError: not text of this encoding, a source with both text and binary integers, or not a label.
        """
        if len(data) > MAX_TEXT:
            raise UserError(f"{where} has {len(data):,} bytes, too many for a label; it holds something else")
        text = self._text(data)
        if self.form == "binary" or (self.form == "auto" and text is None and len(data) in _WIDTHS):
            return self._binary(data, where)
        if text is None:
            shown = data[:12].hex(" ")
            raise UserError(
                f"{where} is not one line of {self.encoding} text ({shown}…); name its encoding (--option encoding=gbk), or write the labels again"
            )
        if text.strip():
            self._agree("text", where)
        elif self._seen and self._seen[0] == _integer(data):  # the integers 9, 10 and 13 are also a tab and line ends
            return self._binary(data, where)
        elif self.form == "auto" and data and (self._seen is None or self._seen[0] != "text"):
            raise UserError(
                f"{where} holds white space only ({data[:12].hex(' ')}): a missing label, or a binary integer; "
                "give --option labels=text or --option labels=binary"
            )
        return self.of_text(text, where)

    def _text(self, data: bytes) -> str | None:
        """The decoded text, without line end and byte order mark; None if it is not text."""
        try:
            text = data.decode(self.encoding)
        except UnicodeError:
            return None
        text = text.removeprefix("\ufeff")
        text = re.sub(r"[\r\n]+\Z", "", text)
        return None if _CONTROL.search(text) else text

    def _binary(self, data: bytes, where: str) -> int:
        if len(data) not in _WIDTHS:
            raise UserError(f"{where} has {len(data)} bytes; a binary label has 1, 2, 4 or 8")
        self._agree(_integer(data), where)
        value = int.from_bytes(data, "little")
        if len(data) >= 4 and value >> (8 * len(data) - 1):
            raise UserError(f"{where} holds the negative integer {data.hex(' ')}; labels count from 0")
        return value

    def _agree(self, form: str, where: str) -> None:
        if self._seen is None:
            self._seen = form, where
        elif self._seen[0] != form:
            raise UserError(
                f"{where} looks like {form}, {self._seen[1]} like {self._seen[0]}; give their form: "
                "--option labels=text or --option labels=binary"
            )

    def of_text(self, text: str, where: str) -> Label | None:
        """A number if the text is plain digits, else a name; None if it is empty.

        Raises:
            UserError: a negative number, or a number that was written differently before (`7` and `007`).
        """
        trimmed = text.strip(" \t\r\n")
        if not trimmed or trimmed == "-1":
            return None
        if re.fullmatch(r"-[0-9]+", trimmed):
            raise UserError(f"{where} holds the label {trimmed}; labels count from 0")
        if not re.fullmatch(r"[0-9]+", trimmed):
            return text
        number = self._number(int(trimmed) if len(trimmed) < 30 else LARGEST + 1, where)
        before = self._spelled.setdefault(number, trimmed)
        if before != trimmed:
            raise UserError(
                f"{where}: the labels {before!r} and {trimmed!r} would become one identity; write them alike"
            )
        return number

    def of_value(self, value: Any, where: str, *, digits: bool = True) -> Label | None:
        """The label in a value of JSON or of a table's cell. `digits`: text of plain digits is a number."""
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        if isinstance(value, bytes):
            decoded = self._text(value)
            if decoded is None:
                raise UserError(f"{where} is not {self.encoding} text; name its encoding (--option encoding=gbk)")
            value = decoded
        if isinstance(value, str):
            if digits:
                return self.of_text(value, where)
            return value if value.strip() else None
        if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(
                f"{where} holds the label {str(value)[:60]!r} ({type(value).__name__}); a name or a whole number is needed"
            )
        return None if value == -1 else self._number(value, where)

    def of_json(self, data: bytes, where: str) -> Label | None:
        """The first of `label`, `cls` and `class` that a JSON object holds; None if it holds none.

        Raises:
            UserError: damaged JSON, a key that occurs twice, or a value that is not a label.
        """
        if len(data) > MAX_JSON:
            raise UserError(f"{where} has {len(data):,} bytes; a JSON with a label has at most {MAX_JSON:,}")
        try:
            body = json.loads(data, object_pairs_hook=lambda pairs: _once(pairs, where))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({' '.join(str(error).split())[:80]}); write it again") from None
        for key in JSON_KEYS if isinstance(body, dict) else ():
            label = self.of_value(body.get(key), where)
            if label is not None:
                return label
        return None

    def _number(self, number: int, where: str) -> int:
        if not 0 <= number <= LARGEST:
            raise UserError(f"{where} holds the label {number}; labels are whole numbers from 0 to 2^63 - 1")
        return number


def _integer(data: bytes) -> str:
    return f"an integer of {len(data)} byte(s)"


def _once(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) != len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise UserError(f"{where} has the key {twice!r} twice; remove one")
    return body
