"""Prints the status of a Slurm chain: `python tools/slurm_status.py runs/NAME [--json]`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from lvtrain.errors import one_line_errors
from lvtrain.launch.slurm import Slurm
from lvtrain.launch.status import chain_status

COLOURS = {
    "done": "green",
    "skipped": "green",
    "running": "cyan",
    "queued": "yellow",
    "stopped": "red",
    "ended": "yellow",
    "lost": "red",
}


def main(run: Path, as_json: bool = typer.Option(False, "--json", help="print JSON")) -> None:
    """Prints one line for each phase, why the chain stopped (if it did), and what to do."""
    with one_line_errors("slurm_status", run):
        status = chain_status(run, Slurm())
    if as_json:
        print(json.dumps(asdict(status), indent=2))
        return
    site = status.chain.site
    title = f"{status.chain.run_folder}: {site.nodes} nodes x {site.tasks} tasks, {site.chain}, jobs {status.chain.job_name}, checkpoint of step {status.step}"
    table = Table()
    for name in ("phase", "state", "attempts", "steps", "jobs", "note"):
        table.add_column(name, overflow="fold")
    for phase in status.phases:
        attempts = f"{phase.attempts}" + (f" ({phase.fruitless} without progress)" if phase.fruitless > 1 else "")
        colour = COLOURS.get(phase.state, "white")
        table.add_row(phase.phase, f"[{colour}]{phase.state}[/]", attempts, phase.steps, phase.jobs, phase.note)
    console = Console(highlight=False)
    console.print(title, markup=False, soft_wrap=True)
    console.print(table)
    for label, text in (("stopped", status.stopped), ("ranks", status.heartbeat), ("next", status.advice)):
        if text:
            console.print(f"{label}: {text}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
