"""Differences between a study's settings, with 95% intervals, as a table in Markdown.

    python -m tools.studies.differences runs/pco/study.json "updated - pco" "pco - baseline" --figure TAR

Runs with the same seed are compared. Where settings come from several pretrainings, runs with the same pretraining and
the same seed are compared; a setting without pretraining is compared with all pretrainings of the other one. The
intervals count how runs differ, not how the figures would differ with other test identities.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

from lvtrain.errors import UserError, one_line_errors
from lvtrain.files import markdown
from lvtrain.files.reading import parse_json

FloatArray = npt.NDArray[np.float64]


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of `study.json`, or of a results file that has them under "study".

    Raises:
        UserError: the file has no such rows.
    """
    try:
        content = parse_json(path.read_bytes())
        rows = content["study"] if isinstance(content, dict) else content
        is_study = all({"setting", "seeds", "figures"} <= row.keys() for row in rows)
    except (ValueError, KeyError, TypeError, AttributeError):
        is_study = False
    if not is_study:
        raise UserError(f"{path} has no rows of a study; tools/study.py writes them as study.json")
    return list(rows)


def title_of(rows: list[dict[str, Any]], figure: str) -> str:
    """The figure's title that `figure` is, or begins.

    Raises:
        UserError: no title, or more than one, begins so.
    """
    titles = list(dict.fromkeys(title for row in rows for title in row["figures"]))
    fitting = [figure] if figure in titles else [title for title in titles if title.startswith(figure)]
    if len(fitting) != 1:
        raise UserError(f"--figure {figure!r} begins {len(fitting)} names; give one of: {', '.join(fitting or titles)}")
    return fitting[0]


def values_of(row: dict[str, Any], title: str) -> tuple[FloatArray, list[int], list[int]]:
    """The values of a row, [pretrainings, seeds], and the names of both. Without pretraining the array has one row.

    Raises:
        UserError: a pretraining lacks a seed that another one has.
    """
    pretrainings = row.get("pretraining_seeds", [0] * len(row["seeds"]))
    found = dict(zip(zip(pretrainings, row["seeds"], strict=True), row["figures"][title]["values"], strict=True))
    kinds, seeds = sorted(set(pretrainings)), sorted(set(row["seeds"]))
    if not len(found) == len(row["seeds"]) == len(kinds) * len(seeds):
        raise UserError(
            f"{row['setting']}: not every pretraining has every seed once; give the study's command again to run the rest"
        )
    return np.array([[found[kind, seed] for seed in seeds] for kind in kinds]), kinds, seeds


def difference(first: dict[str, Any], second: dict[str, Any], title: str) -> FloatArray:
    """The first row - the second, for each pretraining and seed: [pretrainings, seeds].

    Raises:
        UserError: the rows have other seeds or pretrainings, or see `values_of`.
    """
    (a, a_kinds, a_seeds), (b, b_kinds, b_seeds) = values_of(first, title), values_of(second, title)
    both_pretrained = "pretraining_seeds" in first and "pretraining_seeds" in second
    if a_seeds != b_seeds or (both_pretrained and a_kinds != b_kinds):
        raise UserError(
            f"{first['setting']} has seeds {a_seeds} of pretrainings {a_kinds}, {second['setting']} {b_seeds} of {b_kinds};"
            " run both with the same"
        )
    return a - b


def interval(values: FloatArray) -> tuple[float, float]:
    """The mean, and half the width of its 95% interval; NaN for a single run.

    With one pretraining, or one seed, this is Student's interval. With several of both, the variances of the means of
    pretrainings and of seeds are added, and the degrees of freedom are one less than the smaller of the two numbers. So
    the interval is rather too wide than too narrow.

    Args:
        values: [pretrainings, seeds].
    """
    means = [values.mean(axis=1 - axis) for axis in (0, 1) if values.shape[axis] > 1]
    if not means:
        return float(values.mean()), float("nan")
    total = sum(factor.var(ddof=1) / len(factor) for factor in means)
    freedom = min(len(factor) for factor in means) - 1
    return float(values.mean()), float(student.ppf(0.975, freedom) * total**0.5)


def table(rows: list[dict[str, Any]], pairs: list[str], figure: str) -> str:
    """A row for each pair `a - b`, a column for each subset of the study. A cell is empty where a setting has no runs.

    Raises:
        UserError: a pair names a setting that the study lacks, or whose runs cannot be compared.
    """
    title = title_of(rows, figure)
    found: dict[tuple[str, Any], str] = {}
    for pair in pairs:
        names = [name.strip() for name in pair.split(" - ")]
        for place in dict.fromkeys((row.get("fraction"), row.get("shots")) for row in rows):
            of = {row["setting"]: row for row in rows if (row.get("fraction"), row.get("shots")) == place}
            if len(names) == 2 and set(names) <= of.keys():
                mean, half = interval(difference(of[names[0]], of[names[1]], title))
                spread = "" if math.isnan(half) else f" ({mean - half:+.2f} to {mean + half:+.2f})"
                found[pair, place] = f"{mean:+.2f}{spread}"
        if not any(pair == done for done, _ in found):
            settings = ", ".join(dict.fromkeys(row["setting"] for row in rows))
            raise UserError(
                f"{pair!r} is not 'A - B' with two settings that ran on one subset; the settings: {settings}"
            )
    places = list(dict.fromkeys(place for _, place in found))
    heads = [f"{100 * fraction:g}%, {shots}" if fraction is not None else "all" for fraction, shots in places]
    lines = [[pair, *(found.get((pair, place), "") for place in places)] for pair in pairs]
    return markdown.table([[f"difference, {title}", *heads], *lines])


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="study.json of a study, or a results file with its rows under 'study'")
    parser.add_argument("pairs", nargs="+", metavar="'A - B'", help="two settings")
    parser.add_argument("--figure", default="TAR", help="the beginning of a column's name (default: %(default)s)")
    options = parser.parse_args(arguments)
    with one_line_errors("differences"):
        print(table(read(options.file), options.pairs, options.figure))
    return 0


if __name__ == "__main__":
    sys.exit(main())
