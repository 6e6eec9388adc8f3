"""Words of figures that several protocols share: error rates by group, error against discarded share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Line = tuple[str, str]
_FMRS = ("1e-03", "1e-04")  # what tables show, where it is resolved; JSON, report and plots have every one


def rate(share: float) -> str:
    """A small share as text, in percent with three digits."""
    return f"{100 * share:.3g}%"


def group_lines(result: dict[str, Any]) -> Iterator[Line]:
    """Lines of a table: the worst and the best group, their ratio and difference. None without groups."""
    at = (result.get("groups") or {"at": {}})["at"]
    for fmr in _shown(at):
        found = at[fmr]
        for kind in ("fmr", "fnmr"):
            one, by_group = found[kind], found["by_group"]
            ends = f"{rate(by_group[one['best']][kind])} ({one['best']}) to {rate(by_group[one['worst']][kind])} ({one['worst']})"
            yield f"{kind.upper()} by group @FMR={fmr}", f"{ends}, {_ratio(one)}, {_difference(one)}"


def group_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """Rows of the report's table: one for each FMR and group."""
    rows = []
    for fmr, found in (result.get("groups") or {"at": {}})["at"].items():
        for name, one in found["by_group"].items():
            row = {"at FMR": fmr, "group": name, "identities": f"{one['identities']:,}"}
            for kind in ("fmr", "fnmr"):
                span = f"{rate(one[f'{kind}_low'])} to {rate(one[f'{kind}_high'])}"
                row[kind.upper()] = f"{rate(one[kind])} ({span})"
            rows.append(row)
    return rows


def discard_lines(result: dict[str, Any]) -> Iterator[Line]:
    """A line of a table: FNMR before and after a fifth of the genuine comparisons is discarded."""
    found = result.get("error_versus_discard")
    if found and found["at"]:
        fmr = _shown(found["at"])[0]
        before, after = found["at"][fmr]["fnmr"][0], found["at"][fmr]["fnmr"][found["discarded"].index(found["limit"])]
        words = f"{rate(before)}, {rate(after)} without the {100 * found['limit']:.0f}% of lowest {found['quality']}"
        yield f"FNMR@FMR={fmr}", words


def _shown(at: dict[str, Any]) -> list[str]:
    """The FMRs of a table: 1e-3 and 1e-4, or else the lowest that is resolved."""
    return [fmr for fmr in _FMRS if fmr in at] or [min(at, key=float)] if at else []


def _ratio(one: dict[str, Any]) -> str:
    high = "no limit" if one["ratio_high"] is None else f"{one['ratio_high']:.3g}"
    value = "no value" if one["ratio"] is None else f"{one['ratio']:.3g}"
    return f"ratio {value} ({one['ratio_low']:.3g} to {high})"


def _difference(one: dict[str, Any]) -> str:
    return f"difference {rate(one['difference'])} ({rate(one['difference_low'])} to {rate(one['difference_high'])})"
