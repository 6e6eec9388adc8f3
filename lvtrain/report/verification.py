"""What the evaluations of a run show: verification as a table, and its figures."""

from __future__ import annotations

import numpy as np

from lvtrain.evaluation.protocol import percent
from lvtrain.report import figures
from lvtrain.report.files import Row, RunFiles


def fars(run: RunFiles) -> list[str]:
    """Every FAR at which a benchmark has a TAR."""
    found = [b["tar_at_far"] for row in run.evaluations.values() for b in row["benchmarks"].values()]
    return sorted({far for tars in found for far in tars})


def table(run: RunFiles, fars: list[str]) -> list[Row]:
    """A row for each benchmark of each evaluation, with TAR at these FARs."""
    rows = []
    for evaluation, result in run.evaluations.items():
        for suffix, key in (("", "benchmarks"), (", EMA", "benchmarks_ema")):
            for name, figure in (result.get(key) or {}).items():
                tar = figure["tar_at_far"]
                rows.append(
                    {
                        "evaluation": _moment(evaluation) + suffix,
                        "name": name,
                        "pairs": f"{figure['pairs']:,}",
                        "accuracy": percent(figure["accuracy"]),
                        "std": f"{100 * figure['std']:.2f}",
                        "tar": {far: percent(tar[far]) if far in tar else "" for far in fars},
                        "threshold": f"{1 - figure['threshold'] / 2:.3f}",
                        "norm": f"{figure['xnorm']:.2f}" if "xnorm" in figure else "",
                    }
                )
    return rows


def drawn(run: RunFiles) -> list[Row]:
    """ROC, accuracy over training and the pairs' cosines: `title`, `note` and `svg`."""
    if not run.evaluations:
        return []
    names = list(run.evaluations)
    first, last = run.evaluations[names[0]]["benchmarks"], run.evaluations[names[-1]]["benchmarks"]
    made: list[Row] = []

    def add(title: str, note: str, svg: str) -> None:
        made.append({"title": title, "note": note, "svg": svg})

    several = len(names) > 1
    for name, result in last.items():
        curves = {f"{name}, before": first[name]["roc"]} if several and name in first else {}
        curves[f"{name}, {_moment(names[-1])}" if several else name] = result["roc"]
        add(f"ROC, {name}", "true accept rate; false accepts on a log axis", figures.roc(curves))
        if len(names) > 2 and name == next(iter(last)):
            steps = [row["step"] for row in run.evaluations.values()]
            series = {
                one: [row["benchmarks"].get(one, {}).get("accuracy", np.nan) for row in run.evaluations.values()]
                for one in last
            }
            add("Accuracy over training", "ten folds, mean", figures.accuracy(steps, series))
        shown = [(names[0], first.get(name)), (names[-1], result)] if several else [(names[-1], result)]
        results = [(moment, one) for moment, one in shown if one]
        limit = figures.span([one["histogram"] for _, one in results])
        for moment, one in results:
            means = (one["positive_mean"], one["negative_mean"])
            note = f"means {means[0]:.3f} (same person) and {means[1]:.3f} (different people), {means[0] - means[1]:.3f} apart"
            title = f"Pair cosines, {name}, {_moment(moment)}"
            add(title, note, figures.histogram(one["histogram"], means, limit=limit))
    return made


def _moment(evaluation: str) -> str:
    if evaluation == "before":
        return "before training"
    if evaluation == "final":
        return "after training"
    prefix, _, number = evaluation.partition("_")
    return f"step {int(number):,}" if prefix == "step" and number.isdigit() else evaluation
