"""Compares runs: which settings differ, and what each reached."""

from __future__ import annotations

from typing import Any

import numpy as np

from lvtrain.report.files import Row, RunFiles

MOST = 4  # as many as a figure has colours for


def names(runs: list[RunFiles]) -> list[str]:
    """A name for each run: the recipe's if they all differ, otherwise the folder's."""
    own = [run.name for run in runs]
    return own if len(set(own)) == len(own) else [str(run.folder) for run in runs]


def settings(runs: list[RunFiles]) -> list[Row]:
    """Every setting that differs: `key`, and `values` with one for each run ("" if the recipe has none)."""
    flat = [_flat(run.recipe) for run in runs]
    keys = sorted({key for one in flat for key in one} - {"name", "runs"})
    rows = [{"key": key, "values": [one.get(key, "") for one in flat]} for key in keys]
    return [row for row in rows if len({repr(value) for value in row["values"]}) > 1]


def reached(runs: list[RunFiles]) -> list[Row]:
    """One row for each run: state, error, progress, loss, cos^2, speed, and accuracy at the last evaluation.

    Loss and cos^2 are means over the last twentieth of the run's log lines.
    """
    rows = []
    for name, run in zip(names(runs), runs):
        last = list(run.evaluations.values())[-1]["benchmarks"] if run.evaluations else {}
        error = (
            next((str(event.get("reason", "")) for event in reversed(run.events) if event["event"] == "error"), "")
            if run.state == "error"
            else ""
        )
        rows.append(
            {
                "name": name,
                "state": run.state,
                "error": error,
                "steps": f"{run.last_step:,}",
                "loss": _late(run, "loss", ".3f"),
                "cos2": _late(run, "cos2_window", ".3f") or _late(run, "cos2", ".3f"),
                "speed": "" if run.images_per_second is None else f"{run.images_per_second:,.0f}",
                "accuracy": ", ".join(
                    f"{one} {100 * found['accuracy']:.2f} ± {100 * found['std']:.2f}%" for one, found in last.items()
                ),
            }
        )
    return rows


def _late(run: RunFiles, column: str, form: str) -> str:
    values = run.column(column)[1]
    return format(float(np.mean(values[-max(1, len(values) // 20) :])), form) if len(values) else ""


def _flat(value: Any, prefix: str = "") -> Row:
    """Settings by dotted key; a list of named sections (phases) by their names."""
    if isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
        value = {item["name"]: {key: inner for key, inner in item.items() if key != "name"} for item in value}
    if not isinstance(value, dict):
        return {prefix: value}
    found: Row = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return found
