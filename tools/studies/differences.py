"""Differences between a study's settings, with 95% intervals, as a table in Markdown.

    python -m tools.studies.differences runs/pco/study.json "updated - pco" "pco - baseline" --figure TAR

Runs with the same seed are compared. Where settings come from several pretrainings, runs with the same pretraining and
the same seed are compared; a setting without pretraining is compared with all pretrainings of the other one.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

from lvtrain.errors import UserError, one_line_errors

FloatArray = npt.NDArray[np.float64]


def values_of(row: dict[str, Any], figure: str) -> tuple[FloatArray, list[int], list[int]]:
    """The values of a row of `study.json`, [pretrainings, seeds], and the names of both; without pretraining it has one row.

    Raises:
        UserError: no figure, or more than one, begins with `figure`; or a pretraining lacks a seed that another one has.
    """
    titles = [title for title in row["figures"] if title.startswith(figure)]
    if len(titles) != 1:
        raise UserError(
            f"--figure {figure!r} fits {titles or 'none'} of {list(row['figures'])}; write more of one name"
        )
    pretrainings = row.get("pretraining_seeds", [0] * len(row["seeds"]))
    found = dict(zip(zip(pretrainings, row["seeds"], strict=True), row["figures"][titles[0]]["values"], strict=True))
    kinds, seeds = sorted(set(pretrainings)), sorted(set(row["seeds"]))
    if len(found) != len(kinds) * len(seeds):
        raise UserError(f"{row['setting']}: not every pretraining has every seed; give the study's command again")
    return np.array([[found[kind, seed] for seed in seeds] for kind in kinds]), kinds, seeds


def difference(first: dict[str, Any], second: dict[str, Any], figure: str) -> FloatArray:
    """The first row - the second, for each pretraining and seed: [pretrainings, seeds].

    Raises:
        UserError: the rows have other seeds or pretrainings, or see `values_of`.
    """
    (a, a_kinds, a_seeds), (b, b_kinds, b_seeds) = values_of(first, figure), values_of(second, figure)
    both_pretrained = "pretraining_seeds" in first and "pretraining_seeds" in second
    if a_seeds != b_seeds or (both_pretrained and a_kinds != b_kinds):
        raise UserError(
            f"{first['setting']} and {second['setting']} do not have the same seeds; give the study's command again"
        )
    return a - b


def interval(values: FloatArray) -> tuple[float, float]:
    """The mean, and half the width of its 95% interval; NaN for a single run.

    With one pretraining, or one seed, this is Student's interval. With several of both, the variances of the means of
    pretrainings and of seeds are added, and the degrees of freedom are those of the smaller number. So the interval is
    rather too wide than too narrow.

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
    """A row for each pair `a - b`, a column for each subset of the study.

    Raises:
        UserError: a pair names a setting that the study lacks, or whose runs cannot be compared.
    """
    places = list(dict.fromkeys((row.get("fraction"), row.get("shots")) for row in rows))
    places = [place for place in places if place[0] is not None] or places
    titles = [f"{100 * fraction:g}%, {shots}" if fraction is not None else "mean (95%)" for fraction, shots in places]
    lines = [["difference", *titles]]
    for pair in pairs:
        names = [name.strip() for name in pair.split(" - ")]
        line = [pair]
        for place in places:
            of = {row["setting"]: row for row in rows if (row.get("fraction"), row.get("shots")) == place}
            if len(names) != 2 or not set(names) <= of.keys():
                raise UserError(f"{pair!r} is not 'A - B' with two of the settings {', '.join(of)}")
            mean, half = interval(difference(of[names[0]], of[names[1]], figure))
            line.append(f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})")
        lines.append(line)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="study.json of a study, or a results file with its rows under 'study'")
    parser.add_argument("pairs", nargs="+", metavar="'A - B'", help="two settings")
    parser.add_argument("--figure", default="TAR", help="the beginning of a column's name (default: %(default)s)")
    options = parser.parse_args(arguments)
    with one_line_errors("differences"):
        content = json.loads(options.file.read_text())
        rows = content["study"] if isinstance(content, dict) else content
        print(table(rows, options.pairs, options.figure))
    return 0


if __name__ == "__main__":
    sys.exit(main())
