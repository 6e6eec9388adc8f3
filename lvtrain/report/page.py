"""Turns a run's files into one HTML page that fetches no script, font or image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

import lvtrain
from lvtrain.errors import UserError
from lvtrain.evaluation.protocol import percent
from lvtrain.files.atomic import write_text
from lvtrain.methods import method_title
from lvtrain.report import beside, faces, facts, figures, history, protocols, verification
from lvtrain.report.files import Row, RunFiles, read_run

# columns of metrics.jsonl that have another figure, or are not drawn as a curve
_KNOWN = {"time", "step", "samples_seen", "epoch", "loss", "cos2", "cos2_window", "lr", "grad_norm"}
_KNOWN |= {"reference_low", "reference_high", "images_per_second", "data_wait", "nonfinite", "memory_gb"}
_KNOWN |= {"phi_mean", "phi_std", "phi_min", "phi_max"}


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
    events, hidden = history.events(run)
    fars = verification.fars(run)
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
        training=_training(run, others),
        names=beside.names([run, *others]),
        settings=beside.settings([run, *others]),
        reached=beside.reached([run, *others]) if others else [],
        phases=history.phases(run),
        epochs=history.epochs(run),
        benchmarks=verification.table(run, fars),
        fars=fars,
        evaluation=verification.drawn(run),
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

    def add(label: str, value: str, note: str) -> None:
        tiles.append({"label": label, "value": value, "note": note})

    if run.evaluations:
        first, last = next(iter(run.evaluations.items())), list(run.evaluations.items())[-1]
        for name, result in list(last[1]["benchmarks"].items())[:3]:
            note = f"{result['pairs']:,} pairs"
            if first[0] != last[0] and name in first[1]["benchmarks"]:
                note = f"{percent(first[1]['benchmarks'][name]['accuracy'])} before training"
            add(f"Verification, {name}", percent(result["accuracy"]), note)
            if len(last[1]["benchmarks"]) == 1 and result["tar_at_far"]:
                far = min(result["tar_at_far"], key=float)
                add(f"TAR at FAR {far}", percent(result["tar_at_far"][far]), f"{result['pairs']:,} pairs")
    if run.metrics:
        last_row = run.metrics[-1]
        _, waits = run.column("data_wait")
        add("Steps", f"{last_row['step']:,}", f"{last_row.get('epoch', 0):.3g} epochs")
        if run.images_per_second is not None:
            wait = f", {100 * float(np.median(waits)):.0f}% waiting for data" if len(waits) else ""
            add("Images per second", f"{run.images_per_second:,.0f}", f"median of the log lines{wait}")
        if last_row.get("loss") is not None:
            cos2 = last_row.get("cos2_window") or last_row.get("cos2")
            note = f"cos² {cos2:.3f}" if cos2 is not None else ""
            add("Last loss", f"{last_row['loss']:.3f}", note)
        started = run.events[0]["time"] if run.events else run.metrics[0]["time"]
        starts = sum(event["event"] in ("start", "resume") for event in run.events)
        note = "in one go" if starts <= 1 else f"in {starts} starts"
        add("Wall time", _duration(last_row["time"] - started), note)
    return tiles


def _training(run: RunFiles, others: Sequence[RunFiles]) -> list[Row]:
    drawn: list[Row] = []
    phases = run.phases()
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


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
