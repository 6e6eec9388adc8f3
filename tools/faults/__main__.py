"""The sweep of system calls, or a part of it: `python -m tools.faults --operations resume --count 50`.

`tools/torture.py` runs it as one of its cases.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from tools.faults.operations import OPERATIONS, Bench
from tools.faults.shim import Mode
from tools.faults.sweep import GROUPS, Site, Sweep, Trial, all_of, carry_out, keep, sample

RESULTS = Path(__file__).resolve().parent.parent / "results"
# files that must never be lost or taken for damaged: the short sweep, too, makes them fail in every way
STATE = ("/manifest.json", "/run.json", "/recipe.yaml", "/options.json")


def main(
    operations: Annotated[str, typer.Option(help="of save, resume, pack, evaluate")] = ",".join(OPERATIONS),
    ranks: Annotated[str, typer.Option(help="ranks (of a pack: workers)")] = "1,2",
    visits: Annotated[
        int, typer.Option(help="which calls of one kind on one file: the first VISITS and the last; 0: all")
    ] = 1,
    count: Annotated[int, typer.Option(help="trials of each operation, a sample; 0: all")] = 0,
    short: Annotated[bool, typer.Option("--short", help="a sample on one rank that takes a minute")] = False,
    seed: Annotated[int, typer.Option(help="of the sample")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="trials at the same time")] = 1,
    folder: Annotated[
        Path | None, typer.Option(help="folder to work in, which is kept; an earlier sweep in it is continued")
    ] = None,
    results: Annotated[Path, typer.Option(help="folder for syscalls.json and syscalls.md")] = RESULTS,
) -> None:
    """Runs the sweep and writes the table. Exit code 1: a trial was wrong."""
    sizes = [1] if short else [int(size) for size in ranks.split(",")]
    trials: list[Trial] = []
    with contextlib.ExitStack() as stack:
        work = (folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lvtrain_")))).resolve()
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(work)
        for name, size, victim in GROUPS:
            if name not in operations.split(",") or size not in sizes:
                continue
            sites = Sweep(bench, work / "counting").sites(OPERATIONS[name], size, victim)
            pairs = _short(sites, seed) if short else all_of(sites, visits)
            pairs = sample(pairs, count, seed) if count else pairs
            print(f"{name}, {size} ranks, fault on {victim}: {len(pairs)} trials", flush=True)
            own = []
            for trial in carry_out(bench, pairs, jobs, work / "trials.jsonl"):
                own.append(trial)
                if trial.verdict == "wrong":
                    place = f"{trial.site.call} {trial.site.nth} of {trial.site.path}"
                    print(f"WRONG {trial.mode} at {place}: {trial.why}", flush=True)
            print(f"  {dict(Counter(trial.verdict for trial in own))}", flush=True)
            trials += own
            keep(results, trials, {"visits": visits, "sample": count, "short": short, "seed": seed})
    if any(trial.verdict == "wrong" for trial in trials):
        raise typer.Exit(1)


def _short(sites: list[Site], seed: int) -> list[tuple[Site, Mode]]:
    """Three trials of any kind, and three errors while state is read."""
    pairs = all_of(sites, 1)
    state = [
        pair
        for pair in pairs
        if pair[0].path.endswith(STATE) and pair[0].call in ("open", "read", "stat") and pair[1].error
    ]
    return sample(pairs, 3, seed) + sample(state, 3, seed)


if __name__ == "__main__":
    typer.run(main)
