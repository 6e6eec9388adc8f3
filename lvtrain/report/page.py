"""Turns a run's files into one HTML page that fetches no script, font or image."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

import lvtrain
from lvtrain.errors import UserError
from lvtrain.files.atomic import write_text
from lvtrain.methods import method_title
from lvtrain.report import beside, faces, facts, figures, protocols
from lvtrain.report.files import PhaseSpan, Row, RunFiles, read_run

_SHOWN_EVENTS = 200
_MANY = {"checkpoint": 60, "on_track": 15}  # events that are not shown where there are more of them
# columns of metrics.jsonl that have another figure, or are not drawn as a curve
_KNOWN = {"time", "step", "samples_seen", "epoch", "loss", "cos2", "cos2_window", "lr", "grad_norm"}
_KNOWN |= {
    "reference_low",
    "reference_high",
    "images_per_second",
    "data_wait",
    "nonfinite",
    "memory_gb",
    "phi_mean",
    "phi_std",
    "phi_min",
    "phi_max",
}
_REASONS = {
    "cos2": "cosine stage scheduler",
    "length": "longest length",
    "schedule": "end of schedule",
    None: "running",
}


def write_report(
    run_folder: str | Path, out: str | Path | None = None, *, any_faces: bool = False, others: Sequence[str | Path] = ()
) -> Path:
    """Writes the report of a run and returns its path.

    Works for a run that is still training: what does not exist yet is left out.

    Args:
        run_folder: folder of the run.
        out: file to write; None for `report.html` in the run folder.
        any_faces: also draw landmarks and attention on images of a dataset that is not generated; the page then holds real faces.
        others: folders of up to three runs that are drawn beside this one, with what differs in their recipes.

    Raises:
        UserError: not a run folder, or too many of them.
    """
    run = read_run(run_folder)
    if len(others) >= beside.MOST:
        raise UserError(f"{len(others)} runs beside {run_folder}: a figure has colours for {beside.MOST - 1}")
    together = [run, *map(read_run, others)]
    path = Path(out) if out else run.folder / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render(run, together[1:], any_faces=any_faces))
    return path


def render(run: RunFiles, others: Sequence[RunFiles] = (), *, any_faces: bool = False) -> str:
    """The page as HTML text."""
    template = Path(__file__).with_name("page.html.j2").read_text()
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    phases = run.phases()
    events, hidden = _events(run.events)
    fars = sorted(
        {far for row in run.evaluations.values() for b in row["benchmarks"].values() for far in b["tar_at_far"]}
    )
    drawn_faces, without_faces = faces.face_pictures(run, any_dataset=any_faces)
    planned, plan_note = facts.against_plan(run)
    return page.render(
        name=run.name,
        state=run.state,
        lead=_lead(run),
        card=facts.card(run),
        tiles=_tiles(run),
        standing=facts.standing(run),
        sizes=facts.sizes(run),
        planned=planned,
        plan_note=plan_note,
        next_steps=facts.next_steps(run),
        colours=["--blue", "--teal", "--red", "--violet"],  # in the order of figures.RUNS
        training=_training(run, phases, others),
        names=beside.names([run, *others]),
        settings=beside.settings([run, *others]),
        reached=beside.reached([run, *others]) if others else [],
        phases=_phase_table(run, phases),
        epochs=_epochs(run.events),
        benchmarks=_benchmarks(run, fars),
        fars=fars,
        evaluation=_evaluation(run),
        tables=protocols.tables(run),
        headlines=protocols.headlines(run),
        drawn_faces=drawn_faces,
        without_faces=without_faces,
        events=events,
        hidden_events=hidden,
        recipe=run.recipe_text,
        environment=json.dumps(run.environment, indent=2),
        version=lvtrain.__version__,
        folder=run.folder,
    )


# ------------------------------------------------------------------------------------------------------------------- head


def _lead(run: RunFiles) -> str:
    backbone, method = run.recipe.get("backbone") or {}, run.recipe.get("method") or {}
    ranks = run.environment.get("world_size")
    gpus = run.environment.get("gpus") or []
    parts = [
        f"{method_title(str(method.get('name', '')))} on {(run.recipe.get('data') or {}).get('path', 'unknown data')}",
        str(backbone.get("name", "")),
        f"{ranks} rank{'s' if ranks != 1 else ''} on {gpus[0] if gpus else 'CPU'}" if ranks else "",
    ]
    if run.metrics:
        parts.append(datetime.fromtimestamp(run.metrics[0]["time"], UTC).strftime("started %-d %B %Y, %H:%M UTC"))
    return " · ".join(part for part in parts if part)


def _tiles(run: RunFiles) -> list[Row]:
    tiles: list[Row] = []
    if run.evaluations:
        first, last = next(iter(run.evaluations.items())), list(run.evaluations.items())[-1]
        for name, result in list(last[1]["benchmarks"].items())[:3]:
            note = f"{result['pairs']:,} pairs"
            if first[0] != last[0] and name in first[1]["benchmarks"]:
                note = f"{_percent(first[1]['benchmarks'][name]['accuracy'])} before training"
            tiles.append({"label": f"Verification, {name}", "value": _percent(result["accuracy"]), "note": note})
            if len(last[1]["benchmarks"]) == 1 and result["tar_at_far"]:
                far = min(result["tar_at_far"], key=float)
                note = f"{result['pairs']:,} pairs"
                tiles.append({"label": f"TAR at FAR {far}", "value": _percent(result["tar_at_far"][far]), "note": note})
    if run.metrics:
        last_row = run.metrics[-1]
        _, waits = run.column("data_wait")
        note = f"{last_row.get('epoch', 0):.3g} epochs"
        tiles.append({"label": "Steps", "value": f"{last_row['step']:,}", "note": note})
        if run.images_per_second is not None:
            wait = f", {100 * float(np.median(waits)):.0f}% waiting for data" if len(waits) else ""
            tiles.append(
                {
                    "label": "Images per second",
                    "value": f"{run.images_per_second:,.0f}",
                    "note": f"median of the log lines{wait}",
                }
            )
        if last_row.get("loss") is not None:
            cos2 = last_row.get("cos2_window") or last_row.get("cos2")
            note = f"cos² {cos2:.3f}" if cos2 is not None else ""
            tiles.append({"label": "Last loss", "value": f"{last_row['loss']:.3f}", "note": note})
        started = run.events[0]["time"] if run.events else run.metrics[0]["time"]
        starts = sum(event["event"] in ("start", "resume") for event in run.events)
        note = "in one go" if starts <= 1 else f"in {starts} starts"
        tiles.append({"label": "Wall time", "value": _duration(last_row["time"] - started), "note": note})
    return tiles


# ---------------------------------------------------------------------------------------------------------------- figures


def _training(run: RunFiles, phases: list[PhaseSpan], others: Sequence[RunFiles]) -> list[Row]:
    drawn: list[Row] = []
    own, *names = beside.names([run, *others])

    def add(title: str, column: str, note: str = "", **style: Any) -> None:
        steps, values = run.column(column)
        if len(steps) > 1:
            curves = {name: other.column(column) for name, other in zip(names, others)}
            svg = figures.curve(steps, values, phases, beside=curves, name=own, **style)
            drawn.append({"title": title, "note": note, "svg": svg})

    places, low = run.column("reference_low")
    band = (places, low, run.column("reference_high")[1]) if len(places) > 1 else None
    note = "mean over the global batch" + ("; grey: the band of its card" if band else "")
    add("Loss", "loss", note, log=True, reference=band)
    deltas = any(phase.delta for phase in phases)
    note = "mean over the global batch" + (", and the δ that ends each phase" if deltas else "")
    add("cos² to the own class centre", "cos2", note, deltas=True, zero=True)
    add("Learning rate", "lr", "of the backbone", zero=True, smooth=False)
    add("Gradient norm of the backbone", "grad_norm", "before clipping", log=True)
    add("Images per second", "images_per_second", "all ranks together", zero=True)
    add("Waiting for data", "data_wait", "share of the time", zero=True, percent=True)
    add("GPU memory, GB", "memory_gb", "peak of rank 0", zero=True)
    steps, mean = run.column("phi_mean")
    deviation, lowest, highest = (run.column(f"phi_{part}")[1] for part in ("std", "min", "max"))
    if len(steps) > 1 and len(steps) == len(deviation) == len(lowest) == len(highest):
        svg = figures.spread(steps, mean, deviation, lowest, highest, phases)
        note = "mean, standard deviation and range over the classes of a step; small is tight"
        drawn.append({"title": "Concentration φ of the clusters", "note": note, "svg": svg})
    extra = sorted(
        {key for row in run.metrics for key, value in row.items() if isinstance(value, (int, float))} - _KNOWN
    )
    for column in extra[:8]:
        add(column.replace("_", " "), column)
    return drawn


def _evaluation(run: RunFiles) -> list[Row]:
    if not run.evaluations:
        return []
    names = list(run.evaluations)
    first, last = run.evaluations[names[0]]["benchmarks"], run.evaluations[names[-1]]["benchmarks"]
    drawn: list[Row] = []
    several = len(names) > 1
    for name, result in last.items():
        curves = {f"{name}, before": first[name]["roc"]} if several and name in first else {}
        curves[f"{name}, {_moment(names[-1])}" if several else name] = result["roc"]
        drawn.append(
            {
                "title": f"ROC, {name}",
                "note": "true accept rate; false accepts on a log axis",
                "svg": figures.roc(curves),
            }
        )
        if len(names) > 2 and name == next(iter(last)):
            steps = [row["step"] for row in run.evaluations.values()]
            series = {
                one: [row["benchmarks"].get(one, {}).get("accuracy", np.nan) for row in run.evaluations.values()]
                for one in last
            }
            drawn.append(
                {"title": "Accuracy over training", "note": "ten folds, mean", "svg": figures.accuracy(steps, series)}
            )
        shown = [(names[0], first.get(name)), (names[-1], result)] if several else [(names[-1], result)]
        results = [(moment, one) for moment, one in shown if one]
        limit = figures.span([one["histogram"] for _, one in results])
        for moment, one in results:
            means = (one["positive_mean"], one["negative_mean"])
            note = f"means {means[0]:.3f} (same person) and {means[1]:.3f} (different people), {means[0] - means[1]:.3f} apart"
            title = f"Pair cosines, {name}, {_moment(moment)}"
            drawn.append({"title": title, "note": note, "svg": figures.histogram(one["histogram"], means, limit=limit)})
    return drawn


# ----------------------------------------------------------------------------------------------------------------- tables


def _phase_table(run: RunFiles, phases: list[PhaseSpan]) -> list[Row]:
    recipes = {phase.get("name"): phase for phase in run.recipe.get("phases") or []}
    rows = []
    for phase in phases:
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


def _benchmarks(run: RunFiles, fars: list[str]) -> list[Row]:
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
                        "accuracy": _percent(figure["accuracy"]),
                        "std": f"{100 * figure['std']:.2f}",
                        "tar": {far: _percent(tar[far]) if far in tar else "" for far in fars},
                        "threshold": f"{1 - figure['threshold'] / 2:.3f}",
                        "norm": f"{figure['xnorm']:.2f}" if "xnorm" in figure else "",
                    }
                )
    return rows


def _epochs(events: list[Row]) -> list[Row]:
    """A row for each run of epochs that counted alike; a later count of an epoch replaces an earlier one."""
    last = {event["epoch"]: event for event in events if event["event"] == "epoch"}
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


def _events(events: list[Row]) -> tuple[list[Row], str]:
    """Rows for the table, and a line on what is not in it: single bad samples, and the middle of a very long list."""
    counts = Counter(event["event"] for event in events)
    quiet = {"bad_sample", "epoch"} | {name for name, most in _MANY.items() if counts[name] > most}
    shown = [event for event in events if event["event"] not in quiet]
    hidden = [
        f"{counts[name]:,} {name.replace('_', ' ')} events" for name in sorted(quiet - {"epoch"}) if counts[name]
    ]  # epochs have a separate table
    if len(shown) > _SHOWN_EVENTS:
        hidden.append(f"{len(shown) - _SHOWN_EVENTS:,} events between the first and the last {_SHOWN_EVENTS // 2}")
        shown = shown[: _SHOWN_EVENTS // 2] + shown[-_SHOWN_EVENTS // 2 :]
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


def _moment(evaluation: str) -> str:
    if evaluation == "before":
        return "before training"
    if evaluation == "final":
        return "after training"
    prefix, _, number = evaluation.partition("_")
    return f"step {int(number):,}" if prefix == "step" and number.isdigit() else evaluation


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
