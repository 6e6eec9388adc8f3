"""The sweep of system calls alone, in parts: python -m tools.faults --operations resume --count 50 (tools/torture.py has it among its cases)."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from tools.faults.operations import OPERATIONS, Bench
from tools.faults.sweep import GROUPS, Sweep, Trial, all_of, carry_out, keep, sample

RESULTS = Path(__file__).resolve().parent.parent / "results"


def main(
    operations: Annotated[str, typer.Option(help="of save, resume, pack, evaluate")] = ",".join(OPERATIONS),
    ranks: Annotated[str, typer.Option(help="ranks (of a pack: workers)")] = "1,2",
    visits: Annotated[
        int, typer.Option(help="of a file's calls of one kind the first so many and the last; 0: every call")
    ] = 1,
    count: Annotated[int, typer.Option(help="a sample of so many trials of each operation; 0: all")] = 0,
    seed: Annotated[int, typer.Option(help="of the sample")] = 0,
    paths: Annotated[str, typer.Option(help="only calls on files whose path has this in it")] = "",
    modes: Annotated[str, typer.Option(help="only these ways of failing; all if empty")] = "",
    jobs: Annotated[int, typer.Option(min=1, help="trials at a time")] = 1,
    folder: Annotated[
        Path | None, typer.Option(help="work here, keep it, and go on where an earlier sweep was ended")
    ] = None,
    results: Annotated[Path, typer.Option(help="where syscalls.json and syscalls.md go")] = RESULTS,
) -> None:
    """Sweeps and writes the table; exit status 1 if anything is wrong."""
    wrong = sweep(
        operations.split(","),
        [int(size) for size in ranks.split(",")],
        visits=visits,
        count=count,
        seed=seed,
        paths=paths,
        modes=modes,
        jobs=jobs,
        folder=folder,
        results=results,
    )
    if wrong:
        raise typer.Exit(1)


def sweep(
    operations: list[str],
    sizes: list[int],
    *,
    visits: int,
    count: int,
    seed: int,
    paths: str = "",
    modes: str = "",
    jobs: int,
    folder: Path | None,
    results: Path,
) -> list[Trial]:
    """The trials that were wrong."""
    trials: list[Trial] = []
    with contextlib.ExitStack() as stack:
        work = (folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lvtrain_")))).resolve()
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(work)
        for name, size, victim in GROUPS:
            if name not in operations or size not in sizes:
                continue
            pairs = all_of(Sweep(bench, work / "counting").sites(OPERATIONS[name], size, victim), visits)
            pairs = [(site, mode) for site, mode in pairs if paths in site.path and (not modes or mode.name in modes)]
            if count:
                pairs = sample(pairs, count, seed)
            print(f"{name}, {size} ranks, fault on {victim}: {len(pairs)} trials", flush=True)
            for trial in carry_out(bench, pairs, jobs, work / "trials.jsonl"):
                trials.append(trial)
                if trial.verdict == "wrong":
                    site = trial.site
                    print(f"WRONG {trial.mode} at {site.call} {site.nth} of {site.path}: {trial.why}", flush=True)
            own = Counter(
                trial.verdict
                for trial in trials
                if (trial.site.operation, trial.site.size, trial.site.victim) == (name, size, victim)
            )
            print(f"  {dict(own)}", flush=True)
            keep(results, trials, {"visits": visits, "sample": count, "seed": seed})
    return [trial for trial in trials if trial.verdict == "wrong"]


if __name__ == "__main__":
    typer.run(main)
