"""A run's sizes, its speed and memory against the plan, its card, and the commands that come next."""

from __future__ import annotations

import itertools
import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from lvtrain.errors import UserError
from lvtrain.files.reading import parse_json
from lvtrain.planning.device import device
from lvtrain.planning.phases import measure, plan_phases
from lvtrain.planning.plan import Plan
from lvtrain.recipe import files as recipes
from lvtrain.recipe.sections import Recipe
from lvtrain.report.files import Row, RunFiles

CARDS = Path(recipes.__file__).parents[1] / "recipes"


def sizes(run: RunFiles) -> list[Row]:
    """`label` and `value` of parameters, identities and images; what is not known is left out."""
    found, data = run.environment, run.recipe.get("data") or {}
    values = {
        "parameters of the backbone": _parameters(run),
        "identities": found.get("identities") or data.get("num_classes"),
        "images": found.get("images") or data.get("num_samples"),
    }
    return [{"label": label, "value": f"{value:,}"} for label, value in values.items() if value]


def against_plan(run: RunFiles) -> tuple[list[Row], str]:
    """A row for each phase that was trained: images/s, MFU and memory, measured and planned; and a line on the plan.

    MFU is the planner's: three forwards of the backbone, against the matmul rate that a large matmul reaches.
    """
    plans, note = _plans(run)
    rows = []
    for span in run.phases():
        here = [row for row in run.metrics if row.get("phase") == span.name]
        speed = [row["images_per_second"] for row in here if row.get("images_per_second")]
        memory = [row["memory_gb"] for row in here if row.get("memory_gb")]
        row: Row = {"phase": span.name, "speed": f"{np.median(speed):,.0f}" if speed else ""}
        row |= {"memory": f"{max(memory):.1f}" if memory else "", "speed_planned": "", "memory_planned": ""}
        row |= {"mfu": "", "mfu_planned": ""}
        if (planned := plans.get(span.name)) is not None:
            whole = planned.images_per_second * planned.setup.ranks
            row |= {"speed_planned": f"{whole:,.0f}", "memory_planned": f"{planned.total_memory / 1e9:.1f}"}
            row |= {"mfu_planned": f"{planned.mfu:.0%}"}
            row |= {"mfu": f"{planned.mfu * float(np.median(speed)) / whole:.1%}" if speed else ""}
        if speed:
            rows.append(row)
    return rows, note


def _recipe(run: RunFiles) -> Recipe | None:
    try:
        return recipes.resolve(run.recipe)
    except UserError:  # of a method, margin or backbone that is not here
        return None


def _parameters(run: RunFiles) -> int | None:
    recipe = _recipe(run)
    if recipe is None:
        return None
    try:
        return measure(recipe)[0].parameters
    except (UserError, OSError):
        return None


def _plans(run: RunFiles) -> tuple[dict[str, Plan], str]:
    gpus, ranks = run.environment.get("gpus") or [], run.environment.get("world_size")
    if not isinstance(gpus, list) or type(ranks) is not int:  # damaged: another file of the run decides what it is
        return {}, "environment.json is damaged."
    if not gpus or not ranks:
        return {}, "The planner plans GPUs; this run was on a CPU." if ranks else ""
    recipe = _recipe(run)
    if recipe is None:
        return {}, ""
    try:
        config = parse_json((run.folder / "ds_config.json").read_text())
        classes = run.environment.get("identities") or recipe.data.num_classes
        gpu = device(gpus[0], per_node=min(len(gpus), ranks))
        zero = config.get("zero_optimization")
        found = plan_phases(recipe, ranks=ranks, zero=zero, num_classes=classes, device=gpu)
        return found, f"Planned for {ranks} x {gpu.name} ({gpu.links}); tools/plan.py --detail shows every part."
    except (UserError, OSError, ValueError) as error:
        return {}, f"There is no plan: {error}"


# -------------------------------------------------------------------------------------------------------------------- card


def card(run: RunFiles) -> Row | None:
    """The card that the run follows: `name`, `text` (its head comment), `file`; None if it follows none of ours."""
    command = [str(word) for word in run.environment.get("command") or []]
    given = [Path(after).stem for word, after in itertools.pairwise(command) if word == "--recipe"]
    given += [Path(word.partition("=")[2]).stem for word in command if word.startswith("--recipe=")]
    names = [event.get("card") for event in run.events if event["event"] == "reference"]
    for name in (*names[-1:], *given, run.recipe.get("name")):
        path = CARDS / f"{name}.yaml"
        if path.is_file():
            head = path.read_text().partition("\nname:")[0]
            lines = [line.removeprefix("#").removeprefix(" ") for line in head.splitlines() if line.startswith("#")]
            file = f"lvtrain/recipes/{path.name}"
            link = os.path.relpath(path, run.folder.resolve()) if _is_near(path, run.folder) else ""
            return {
                "name": path.stem,
                "text": "\n".join(lines),
                "file": file,
                "link": Path(link).as_posix() if link else "",
            }
    return None


def _is_near(path: Path, folder: Path) -> bool:
    """Whether the run lies in the repository that holds the card, so that a relative link is right."""
    return folder.resolve().is_relative_to(CARDS.resolve().parents[1])


def standing(run: RunFiles) -> list[Row]:
    """What the checks of the run's health found, newest last: `what`, `text`, and `good` (None where that is open)."""
    rows: list[Row] = []
    for event in run.events:
        if event["event"] == "first_loss":
            text = f"{event['loss']:.2f}, expected {event['expected']:.2f} ± {event['bound']:.2f}"
            causes = ", ".join(_cause(*each) for each in (event.get("causes") or {}).items())
            text += f"; it would come from: {causes}" if causes else ""
            rows.append({"what": "first loss", "text": text, "good": event["agrees"]})
        elif event["event"] == "delta":
            verb = "reached" if event["reached"] else "not reached"
            text = (
                f"{verb} at epoch {event['epoch']:.3g}, expected between {event['earliest']:g} and {event['latest']:g}"
            )
            what = f"δ = {event['delta']:g}, {event['phase']}"
            rows.append({"what": what, "text": text, "good": event["stand"] == "as expected" or None})
    compared = [event for event in run.events if event["event"] == "on_track"]
    for event in compared[-1:]:
        inside = sum(one["stand"] == "within" for one in compared)
        text = f"{event['loss']:.3g} at epoch {event['epoch']:g}, {event['stand']} the band of {event['card']}: "
        text += f"{event['low']:.3g} to {event['high']:.3g}. Within the band at {inside} of {len(compared)} comparisons"
        rows.append({"what": "loss", "text": text, "good": event["stand"] == "within" or None})
    return rows


def _cause(kind: str, value: float | None) -> str:
    words = kind.replace("_", " ")
    return words if value is None else f"{words} {value:.3g}"


# -------------------------------------------------------------------------------------------------------------------- next


def next_steps(run: RunFiles) -> list[Row]:
    """What to do with the run now: `what` and a `command` to paste."""
    folder = shlex.quote(str(run.folder))
    export = f"python tools/convert_checkpoint.py export {folder}"
    if run.state in ("stopped", "error", "running"):
        go_on = {"what": "Go on where it stopped", "command": _command(run)}
        steps = [] if run.state == "running" else [go_on]
        return [*steps, {"what": "Make this page again", "command": f"python tools/report.py {folder}"}]
    benchmarks = (run.recipe.get("evaluation") or {}).get("benchmarks") or {"lfw": "data/eval/lfw.bin"}
    given = [
        f"--benchmark {shlex.quote(f'{name}:{path}')}" for name, path in benchmarks.items() if isinstance(path, str)
    ]
    return [
        {"what": "Evaluate", "command": " ".join([f"python tools/evaluate.py {folder}", *given])},
        {"what": "Export to ONNX", "command": f"{export} {folder}.onnx --to onnx"},
        {"what": "Export as a pack for insightface", "command": f"{export} {folder}_pack --to insightface"},
        {"what": "Compare with another run", "command": f"python tools/report.py {folder} --beside runs/OTHER"},
    ]


def _command(run: RunFiles) -> str:
    command: Any = run.environment.get("command")
    ranks = run.environment.get("world_size") or 1
    if not isinstance(command, list) or not command:
        return "start the same command again"
    arguments = [word for word in map(str, command[1:]) if not word.startswith("--local_rank")]
    return shlex.join(["deepspeed", "--num_accelerators", str(ranks), "lvtrain/main.py", *arguments])
