"""What happened in a run: rows for the tables of its phases, its epochs and its events."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import Any

from lvtrain.report.files import Row, RunFiles

_SHOWN = 200
_MANY = {"checkpoint": 60, "on_track": 15}  # events that are not shown where there are more of them
_REASONS = {
    "cos2": "cosine stage scheduler",
    "length": "longest length",
    "schedule": "end of schedule",
    None: "running",
}


def phases(run: RunFiles) -> list[Row]:
    """A row for each phase that was entered."""
    recipes = {phase.get("name"): phase for phase in run.recipe.get("phases") or []}
    rows = []
    for phase in run.phases():
        said = recipes.get(phase.name, {})
        rows.append(
            {
                "name": phase.name,
                "start": f"{phase.start:,}",
                "stop": f"{phase.stop:,}",
                "reason": _REASONS.get(phase.reason, phase.reason),
                "delta": "" if phase.delta is None else f"{phase.delta:g}",
                "sample_rate": said.get("sample_rate", ""),
                "expectation": said.get("expectation", ""),
                "global_batch": f"{said['global_batch']:,}" if said.get("global_batch") else "",
            }
        )
    return rows


def epochs(run: RunFiles) -> list[Row]:
    """A row for each run of epochs that counted alike; a later count of an epoch replaces an earlier one."""
    last = {event["epoch"]: event for event in run.events if event["event"] == "epoch"}
    shown = ("images", "served", "distinct", "skipped", "undecoded", "nonfinite", "uncounted", "exact", "complete")
    rows: list[Row] = []
    for number, event in sorted(last.items()):
        facts = {name: event.get(name) for name in shown}
        if rows and rows[-1]["facts"] == facts:
            rows[-1]["last"] = number
            continue
        verdict = (
            "not complete" if not facts["complete"] else {True: "yes", False: "NO", None: "not counted"}[facts["exact"]]
        )
        rows.append({"first": number, "last": number, "facts": facts, "verdict": verdict})
    return rows


def events(run: RunFiles) -> tuple[list[Row], str]:
    """Rows for the table, and a line on what is not in it: single bad samples, and the middle of a very long list."""
    counts = Counter(event["event"] for event in run.events)
    quiet = {"bad_sample", "epoch"} | {name for name, most in _MANY.items() if counts[name] > most}
    shown = [event for event in run.events if event["event"] not in quiet]
    hidden = [
        f"{counts[name]:,} {name.replace('_', ' ')} events" for name in sorted(quiet - {"epoch"}) if counts[name]
    ]  # epochs have a separate table
    if len(shown) > _SHOWN:
        hidden.append(f"{len(shown) - _SHOWN:,} events between the first and the last {_SHOWN // 2}")
        shown = shown[: _SHOWN // 2] + shown[-_SHOWN // 2 :]
    common = {"time", "event", "step", "phase", "samples_seen"}
    rows = [
        {
            "time": datetime.fromtimestamp(event["time"], UTC).strftime("%d %b %H:%M:%S") if "time" in event else "",
            "event": event["event"].replace("_", " "),
            "step": f"{event['step']:,}" if isinstance(event.get("step"), int) else "",
            "phase": event.get("phase") or "",
            "detail": ", ".join(
                f"{k.replace('_', ' ')} {_value(v)}" if k != "text" else _value(v)  # a warning's words need no name
                for k, v in event.items()
                if k not in common and v is not None
            ),
        }
        for event in shown
    ]
    return rows, f"Not shown: {', '.join(hidden)}; see events.jsonl." if hidden else ""


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(inner)}" for name, inner in value.items())
    return str(value)
