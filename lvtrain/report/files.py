"""Reads a run folder leniently: a report must be possible for a run that has just begun, was interrupted or still runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lvtrain.errors import UserError
from lvtrain.files.reading import parse_json, read_records
from lvtrain.recipe import files as recipes

Row = dict[str, Any]


@dataclass(frozen=True)
class PhaseSpan:
    """One phase that was run: name, first and last step, why it ended (None while it runs), and CSS's delta, if any."""

    name: str
    start: int
    stop: int
    reason: str | None
    delta: float | None


@dataclass(frozen=True)
class RunFiles:
    """What a run folder holds, read. Rows are dicts as they lie in the JSON files."""

    folder: Path
    recipe: Row
    recipe_text: str
    environment: Row
    metrics: list[Row]
    events: list[Row]
    evaluations: dict[str, Row] = field(default_factory=dict)
    protocols: dict[str, Row] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.recipe.get("name") or self.folder.resolve().name)

    @property
    def state(self) -> str:
        """State of the run: running, done, stopped (on request) or error, from its events."""
        names = {"done": "done", "stop": "stopped", "error": "error", "start": "running", "resume": "running"}
        return next((names[event["event"]] for event in reversed(self.events) if event["event"] in names), "running")

    @property
    def last_step(self) -> int:
        """The last step, from the last log line, or from the last event if there is none."""
        rows = self.metrics or [event for event in self.events if isinstance(event.get("step"), int)]
        return int(rows[-1]["step"]) if rows else 0

    @property
    def images_per_second(self) -> float | None:
        """Images per second over all ranks: the median over all log lines, which a slow start or a stall does not change."""
        speeds = self.column("images_per_second")[1]
        return float(np.median(speeds)) if len(speeds) else None

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps [K] and values [K], float64, of the rows that have a number under `name`."""
        pairs = [(row["step"], row[name]) for row in self.metrics if isinstance(row.get(name), (int, float))]
        table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    def phases(self) -> list[PhaseSpan]:
        """Phases in the order they were entered; a phase entered again after a roll-back keeps its first start."""
        deltas = {phase.get("name"): (phase.get("end") or {}).get("cos2") for phase in self.recipe.get("phases") or []}
        last = max((row["step"] for row in self.metrics), default=0)
        starts: dict[str, int] = {}
        ends: dict[str, tuple[int, str | None]] = {}
        for event in self.events:
            if event["event"] == "phase_start":
                starts.setdefault(event["phase"], event["step"])
            elif event["event"] == "phase_end":
                ends[event["phase"]] = (event["step"], str(event.get("reason")))
        spans = []
        for name, start in starts.items():
            stop, reason = ends.get(name, (max(last, start), None))
            spans.append(PhaseSpan(name, start, stop, reason, deltas.get(name)))
        return spans


def read_run(folder: str | Path) -> RunFiles:
    """Reads the files of a run folder. All but `recipe.yaml` may be absent.

    They are `recipe.yaml`, `environment.json`, `metrics.jsonl`, `events.jsonl`, `evaluation/*.json`, and
    `*/evaluation.json` of `tools/evaluate.py`.

    Raises:
        UserError: no such folder, or it is not a run folder (no recipe.yaml).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"run folder {folder} does not exist")
    recipe = folder / "recipe.yaml"
    if not recipe.is_file():
        raise UserError(f"{folder} is not a run folder: it has no recipe.yaml")
    text = recipe.read_text()
    evaluations = {
        path.stem: _json(path) for path in sorted((folder / "evaluation").glob("*.json")) if path.stem != "evaluation"
    }
    others = {f"step {row.get('step')}": _take_others(row) for row in evaluations.values()}
    others |= {
        path.parent.name: _json(path).get("benchmarks") or {} for path in sorted(folder.glob("*/evaluation.json"))
    }
    return RunFiles(
        folder=folder,
        recipe=recipes.of_run(text),
        recipe_text=text,
        environment=_json(folder / "environment.json"),
        metrics=read_records(folder / "metrics.jsonl", "step", int)[0],
        events=read_records(folder / "events.jsonl", "event", str)[0],
        evaluations=dict(sorted(((k, v) for k, v in evaluations.items() if v.get("benchmarks")), key=_moment)),
        protocols={name: found for name, found in others.items() if found},
    )


def _take_others(evaluation: Row) -> Row:
    """Removes the results of protocols other than verification from an evaluation during training; returns them."""
    found: Row = {}
    for key in ("benchmarks", "benchmarks_ema"):
        results = evaluation.get(key) or {}
        for name in [name for name, result in results.items() if result.get("kind", "verification") != "verification"]:
            found[name + key.removeprefix("benchmarks").replace("_", ", ")] = results.pop(name)
    return found


def _moment(item: tuple[str, Row]) -> tuple[int, int]:
    name, row = item
    # before and final stand at the ends even if a step's file has the same step
    return row.get("step", 0), {"before": -1, "final": 1}.get(name, 0)


def _json(path: Path) -> Row:
    try:
        value = parse_json(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
