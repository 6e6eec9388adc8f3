"""The sweep of system calls, or a part of it: `python -m tools.faults --operations resume --count 50`.

`tools/torture.py` runs it as one of its cases.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tools.faults.operations import OPERATIONS, Bench
from tools.faults.shim import Mode
from tools.faults.sweep import GROUPS, Site, Sweep, all_of, carry_out, in_turns, keep

# files that must never be lost or taken for damaged: the short sweep makes them fail, too
STATE = ("/manifest.json", "/run.json", "/recipe.yaml", "/catalogue.json", "/index.bin")
SHORT = ["save", "resume", "pack", "evaluate"]
RESULTS = Path(__file__).resolve().parent.parent / "results"


def main(
    operations: Annotated[str, typer.Option(help="of save, resume, pack, evaluate, draw")] = ",".join(OPERATIONS),
    ranks: Annotated[str, typer.Option(help="ranks (of a pack: workers)")] = "1,2",
    visits: Annotated[
        int, typer.Option(help="which calls of one kind on files of one role: the first VISITS and the last; 0: all")
    ] = 1,
    count: Annotated[int, typer.Option(help="trials in all, taken from every call and every mode in turn; 0: all")] = 0,
    minutes: Annotated[float, typer.Option(help="no trial begins after that time")] = 1e6,
    short: Annotated[bool, typer.Option("--short", help="16 trials on one rank")] = False,
    seed: Annotated[int, typer.Option(help="of the order")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="trials at the same time")] = 1,
    folder: Annotated[
        Path | None, typer.Option(help="folder to work in, which is kept; an earlier sweep in it is continued")
    ] = None,
    results: Annotated[Path, typer.Option(help="folder for syscalls.json and syscalls.md")] = RESULTS,
) -> None:
    """Runs the sweep and writes the table. Exit code 1: a trial was wrong."""
    names, sizes = (SHORT, ["1"]) if short else (operations.split(","), ranks.split(","))
    chosen = [group for group in GROUPS if group[0] in names and str(group[1]) in sizes]
    with contextlib.ExitStack() as stack:
        work = (folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lvtrain_")))).resolve()
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(work)
        pairs = all_of([site for group in chosen for site in _sites(bench, *group)], visits)
        pairs = _short(pairs, seed) if short else in_turns(pairs, seed)
        trials = []
        for trial in carry_out(bench, pairs[: count or None], jobs, work / "trials.jsonl", minutes):
            trials.append(trial)
            if trial.verdict == "wrong":
                site = trial.site
                print(f"WRONG {trial.mode} at {site.operation} {site.call} {site.nth} of {site.path}: {trial.why}")
            if len(trials) % 50 == 0:
                print(f"{len(trials)} of {len(pairs)}: {dict(Counter(one.verdict for one in trials))}", flush=True)
        keep(results, trials, pairs, {"visits": visits, "count": count, "seed": seed})
    if any(trial.verdict == "wrong" for trial in trials):
        raise typer.Exit(1)


def _short(pairs: list[tuple[Site, Mode]], seed: int) -> list[tuple[Site, Mode]]:
    """Of each operation two trials of any kind, and two errors while state is read."""
    chosen = []
    for operation in SHORT:
        own = in_turns([pair for pair in pairs if pair[0].operation == operation], seed)
        state = [
            pair for pair in own if pair[0].path.endswith(STATE) and pair[0].call in ("open", "read") and pair[1].error
        ]
        chosen += own[:2] + state[:2]
    return chosen


def _sites(bench: Bench, operation: str, size: int, victim: int) -> list[Site]:
    """Every call of an operation, counted once for a folder, so that a sweep that is continued has the same trials."""
    path = bench.folder / f"calls_{operation}_{size}_{victim}.json"
    if not path.exists():
        found = Sweep(bench, bench.folder / "counting").sites(OPERATIONS[operation], size, victim)
        path.write_text(json.dumps([asdict(site) for site in found]))
    return [Site(**site) for site in json.loads(path.read_text())]


if __name__ == "__main__":
    typer.run(main)
