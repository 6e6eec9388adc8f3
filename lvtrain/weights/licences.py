"""Whether a licence allows commercial use, read off its name or its terms."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

Use = Literal["yes", "unknown", "no"]
_STRICTEST: tuple[Use, ...] = ("no", "unknown", "yes")

_STATED = re.compile(r"^commercial(?: use)?: *(yes|no)\b")
_FORBIDDEN = re.compile(
    r"\bnc\b|non[- ]?commercial|\bno commercial|not for commercial|commercial use (is )?(not|forbidden|prohibited)\b"
    r"|\bresearch\b|\bacademic\b|\beducational\b"
)
_ALLOWED = re.compile(
    r"^(cc0|cc[- ]by([- ]sa)?|apache|mit|bsd|odbl|odc-by|pddl|unlicense|public domain)(?![a-z])(?![- ]n[cd])"
)


def commercial_use(terms: str | None) -> Use:
    """Whether `terms` allow commercial use, as far as a name or a short text says.

    Terms that begin with `commercial: yes` or `commercial: no` say it themselves. Open licences by their SPDX name
    (`CC0-1.0`, `CC-BY-4.0`, `Apache-2.0`, `MIT`, ...) allow it. Terms that speak of research, academic or non-commercial
    use forbid it. Everything else is unknown. This is a reading of the text and not legal advice.
    """
    text = (terms or "").strip().lower()
    if stated := _STATED.search(text):
        return "yes" if stated[1] == "yes" else "no"
    if _FORBIDDEN.search(text):
        return "no"
    return "yes" if _ALLOWED.search(text) else "unknown"


def strictest(uses: Iterable[Use]) -> Use:
    """`no` before `unknown` before `yes`; `unknown` for none at all."""
    found = set(uses)
    return next((use for use in _STRICTEST if use in found), "unknown")
