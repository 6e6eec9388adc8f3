"""The results of a study's finished cells, as rows and as a printed table."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lvtrain.evaluation import suite
from tools.studies.definition import Study
from tools.studies.grid import Grid, finished


def collect(grid: Grid) -> list[dict[str, Any]]:
    """A row for every setting (of every subset) with a finished cell; pretraining runs are rows without a subset.

    A row is `{setting, subset…, seeds, figures}`, where `figures` is `{title: {mean, std, values}}` over the seeds.
    """
    rows = []
    for place in dict.fromkeys((cell.fraction, cell.shots, cell.setting) for cell in grid.cells):
        members = [cell for cell in grid.cells if (cell.fraction, cell.shots, cell.setting) == place]
        found = {cell: _figures(grid.folder(cell), grid.study) for cell in members}
        done = {cell: figures for cell, figures in found.items() if figures}
        if not done:
            continue
        titles = list(next(iter(done.values())))
        row: dict[str, Any] = {"setting": members[0].setting + (" (frozen)" if members[0].is_first else "")}
        if members[0].fraction is not None:
            row |= {"fraction": members[0].fraction, "shots": members[0].shots or "all"}
        figures = {title: _over_seeds([values[title] for values in done.values()]) for title in titles}
        seeds = {"seeds": [cell.seed for cell in done]}
        if members[0].pretraining is not None:
            seeds["pretraining_seeds"] = [cell.pretraining for cell in done if cell.pretraining is not None]
        rows.append(row | seeds | {"figures": figures})
    return rows


def _figures(folder: Path, study: Study) -> dict[str, float] | None:
    """Results of a finished run, by title; None if it is not finished."""
    final, identities = folder / "evaluation" / "final.json", folder / "unseen.json"
    if not finished(folder) or (study.unseen and not identities.exists()):
        return None
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figures = {"loss": statistics.fmean(losses[-max(1, len(losses) // 10) :])}
    benchmarks = json.loads(final.read_text())["benchmarks"] if final.exists() else {}
    for name, found in benchmarks.items():
        figures[f"{name} %"] = 100 * suite.figure(found)
        if found["kind"] == "verification":
            figures[f"{name} pos - neg cosine"] = found["positive_mean"] - found["negative_mean"]
    if study.unseen:
        unseen = json.loads(identities.read_text())
        figures[f"TAR@FAR={study.far} %"] = 100 * unseen["all_pairs"]["tar_at_far"][study.far]["tar"]
        figures |= {
            f"{name} B³F %": 100 * found["bcubed_f"]
            for name, found in unseen["clustering"].items()
            if isinstance(found, dict)
        }
    return figures


def _over_seeds(values: list[float]) -> dict[str, Any]:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": spread, "values": [round(value, 4) for value in values]}


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table, figures as mean ± standard deviation over seeds."""
    titles = list(dict.fromkeys(title for row in rows for title in row["figures"]))
    subset = any("fraction" in row for row in rows)
    printed = Table(*(["identities", "shots"] if subset else []), "setting", "seeds", *titles)
    for row in rows:
        place = [f"{100 * row['fraction']:g}%", str(row["shots"])] if "fraction" in row else [""] * (2 * subset)
        printed.add_row(
            *place, row["setting"], str(len(row["seeds"])), *(_cell(row["figures"].get(t), t) for t in titles)
        )
    Console(width=160).print(printed)


def _cell(figure: dict[str, Any] | None, title: str) -> str:
    if figure is None:
        return ""
    digits = 2 if title.endswith("%") else 3
    spread = "" if figure["std"] is None else f" ± {figure['std']:.{digits}f}"
    return f"{figure['mean']:.{digits}f}{spread}"
