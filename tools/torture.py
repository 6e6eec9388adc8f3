"""Damages small runs in every known way and counts what was lost: `python tools/torture.py [--kills 50] [--only kill,flip]`.

- `kill`: kill -9 at random moments, also during saves, until the runs of all methods are done (`tools/kills.py`).
- `elastic`: resumes on other numbers of ranks.
- `flip`: a bit of the newest checkpoint changes.
- `disk`: the disk becomes full (a small tmpfs; needs root).
- `nan`: outputs that are not finite.
- `freeze`: a rank stops without ending.
- `syscalls`: system calls fail, return less than asked, or the process is killed in them, in a save, a resume, a pack and
  two evaluations (`tools/faults`, results/syscalls.md).

Each case ends with a finished run. Its checkpoint is compared, tensor by tensor and byte by byte, with that of an
undisturbed run. Results go to tools/results/torture.json and torture.md. `tools/trial.py` has the run, on 2 gloo ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import typer  # noqa: E402 - the path must be set first

from tools.faults.sweep import read_log  # noqa: E402
from tools.kills import BATCH, kills  # noqa: E402
from tools.trial import EVERY, TOTAL, Bench, end, last_step, newest_committed, rows, run_folder  # noqa: E402

RESULTS = ROOT / "tools" / "results"
HEADING = """# Torture

`python tools/torture.py` trains the quick start on 2 gloo ranks under ZeRO-{zero}, shortened to {total}
steps of 16 images with a checkpoint every {every}. It injects faults, resumes, and compares the final
checkpoint and the log line of every step, byte by byte, with a run without faults.

| case | fault |
|---|---|
| kill | kill -9 at random moments, also during saves, in small runs of every method |
| elastic | stop, and resume on 2, 1, 4 and 2 ranks; the results may differ by rounding |
| flip | one bit of the newest checkpoint changes, in each kind of file |
| disk | the disk becomes full, and is enlarged later |
| nan | the outputs of one rank are NaN in one step, or in three steps in a row |
| freeze | one rank stops without ending (SIGSTOP) |
| syscalls | system calls fail: [syscalls](syscalls.md) |

The runs of `kill` (`tools/kills.py`) have 18 steps of 16 images, with a checkpoint every 3, under
ZeRO-2 or ZeRO-1. When a run finishes, it is started again, until there are enough kills.

"""
CASES = ("kill", "elastic", "flip", "disk", "nan", "freeze", "syscalls")


@dataclass
class Case:
    """One kind of fault and its results."""

    name: str
    faults: int = 0
    survived: int = 0
    lost_samples: int = 0
    wrong_bits: int = 0
    seconds: float = 0.0
    note: str = ""
    details: list[dict[str, Any]] = field(default_factory=list)


def finish(bench: Bench, case: Case, runs: Path, size: int = 2) -> None:
    """Runs to the end without faults, and counts what differs from the undisturbed run."""
    codes = bench.run(runs, size)
    if codes != [0] * size:
        case.wrong_bits = -1
        case.note = f"did not finish: {codes}; {bench.last_line(runs)}"
        return
    differ = bench.differing(runs)
    case.wrong_bits += len(differ)
    case.note = case.note or (f"differ: {differ[:3]}" if differ else "")


def kill(bench: Bench, case: Case, count: int, seed: int) -> None:
    """Kill -9 of one rank or all, at random moments or points of a save, over all methods (`tools/kills.py`)."""
    methods = Counter[str]()
    for record in kills(bench.folder / "kills", count, seed, bench.limit):
        case.details.append(record)
        if "victim" in record:
            case.faults += 1
            methods[record["method"]] += 1
            case.lost_samples += max(0, record["reached"] - record["committed"]) * BATCH
            print(f"kill {case.faults}: {record}", flush=True)
        else:
            case.wrong_bits += len(record["differ"])
            print(f"end: {record}", flush=True)
    case.survived = case.faults if not case.wrong_bits else 0
    ends = sum("victim" not in record for record in case.details)
    case.note = f"{ends} runs ended; kills by method: " + ", ".join(f"{name} {n}" for name, n in methods.items())


def elastic(bench: Bench, case: Case) -> None:
    """Stopped and resumed on 2, 1, 4 and 2 ranks, across a phase change."""
    runs = bench.folder / "elastic"
    for size, stop in ((2, 17), (1, 38), (4, 61)):
        codes = bench.run(runs, size, f"loop.step:0:{stop}:sigterm")
        case.faults += 1
        case.survived += codes == [75] * size
        case.details.append({"ranks": size, "codes": codes, "stopped_at": newest_committed(runs)})
    codes = bench.run(runs, 2)
    case.survived += codes == [0, 0]
    case.faults += 1
    ours, theirs = rows(run_folder(runs)), rows(run_folder(bench.undisturbed()))
    apart = [abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(ours, theirs)]
    changed = case.details[0]["stopped_at"]  # the first step on another number of ranks starts from the same bits
    same_samples = [row["samples_seen"] for row in ours] == [row["samples_seen"] for row in theirs]
    case.wrong_bits = 0 if same_samples and apart[changed] < 1e-6 and max(apart) < 1e-2 else 1
    case.note = (
        f"on other ranks the loss of the first step differs by {apart[changed]:.0e} (relative), that of all "
        f"{len(ours)} steps by at most {max(apart):.0e}"
    )


def flip(bench: Bench, case: Case, seed: int) -> None:
    """One bit of one file of the newest checkpoint changes, for each kind of file."""
    chance = random.Random(seed)
    runs = bench.folder / "flip"
    for position, name in enumerate(
        ("rank_00000.safetensors", "rank_00001.safetensors", "state.json", "manifest.json")
    ):
        bench.run(runs, 2, f"loop.step:*:{(position + 1) * 3 * EVERY + 1}:sigkill")
        newest = newest_committed(runs)
        path = run_folder(runs) / "checkpoints" / f"step_{newest:09d}" / name
        data = bytearray(path.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        case.faults += 1
        case.lost_samples += EVERY * 16
        case.details.append({"file": name, "step": newest})
    finish(bench, case, runs)
    put_aside = len(list((run_folder(runs) / "checkpoints").glob("damaged_*")))
    case.survived = case.faults if case.wrong_bits == 0 else 0
    case.note = case.note or f"{put_aside} damaged checkpoints renamed"


def disk(bench: Bench, case: Case) -> None:
    """The run folder is a tmpfs with room for two checkpoints; later it is enlarged."""
    if os.geteuid() != 0:
        case.note = "not run: mounting a tmpfs needs root"
        return
    one = sum(
        path.stat().st_size for path in next((run_folder(bench.undisturbed()) / "checkpoints").glob("step_*")).iterdir()
    )
    runs = bench.folder / "disk"
    runs.mkdir()
    small = ["-t", "tmpfs", "-o", f"size={int(2.3 * one) + (1 << 20)}", "tmpfs", str(runs)]
    if subprocess.run(["mount", *small], capture_output=True).returncode:
        case.note = "not run: a tmpfs cannot be mounted here"
        return
    try:
        case.faults = 1
        codes = bench.run(runs)
        errors = [line for line in bench.output(runs).splitlines() if "lvtrain: error" in line]
        case.details.append({"codes": codes, "errors": errors[-1:], "committed": newest_committed(runs)})
        stopped = codes == [2, 2] and bool(errors) and newest_committed(runs) > 0
        subprocess.run(["mount", "-o", f"remount,size={64 * one + (64 << 20)}", str(runs)], check=True)
        case.lost_samples = max(0, last_step(runs) - newest_committed(runs)) * 16
        finish(bench, case, runs)
        case.survived = int(stopped and case.wrong_bits == 0)
        case.note = case.note or (errors[-1] if errors else "")
    finally:
        subprocess.run(["umount", "-l", str(runs)], check=False)


def nan(bench: Bench, case: Case) -> None:
    """One rank's outputs are NaN in one step (it is skipped), then in three in a row (the run stops)."""
    runs = bench.folder / "nan_once"
    codes = bench.run(runs, 2, "loop.outputs:1:20:nan")
    case.faults += 1
    case.survived += codes == [0, 0] and any(row["nonfinite"] for row in rows(run_folder(runs)))
    case.lost_samples += 16
    case.details.append({"steps": 1, "codes": codes, "last_step": last_step(runs)})
    runs = bench.folder / "nan_thrice"
    codes = bench.run(runs, 2, ";".join(f"loop.outputs:1:{step}:nan" for step in (40, 41, 42)))
    case.faults += 1
    case.details.append({"steps": 3, "codes": codes, "committed": newest_committed(runs)})
    stopped = codes == [2, 2] and newest_committed(runs) == 40
    finish(bench, case, runs)
    case.survived += int(stopped and case.wrong_bits == 0)


def freeze(bench: Bench, case: Case) -> None:
    """A rank gets SIGSTOP: the others end within the collective timeout, and the next start resumes."""
    runs = bench.folder / "freeze"
    started = time.monotonic()
    codes = end(bench.start(runs, 2, "loop.step:1:25:sigstop", "safety.collective_timeout=20"), 240.0)
    case.faults = 1
    case.details.append({"codes": codes, "seconds_to_end": round(time.monotonic() - started, 1)})
    reached, committed = last_step(runs), newest_committed(runs)
    case.lost_samples = max(0, reached - committed) * 16
    ended = codes[0] not in (None, 0, -9)
    case.details.append({"logs": sorted(path.name for path in (run_folder(runs) / "logs").glob("*"))})
    finish(bench, case, runs)
    case.survived = int(ended and case.wrong_bits == 0)


def syscalls(bench: Bench, case: Case, count: int, results: Path) -> None:
    """`count` trials (0: all), in another process, whose children have a library preloaded."""
    sweep = [sys.executable, "-m", "tools.faults", "--count", str(count), "--results", str(results)]
    subprocess.run([*sweep, "--folder", str(bench.folder / "syscalls")], cwd=ROOT, check=False)
    verdicts = Counter(trial.verdict for trial in read_log(bench.folder / "syscalls" / "trials.jsonl"))
    case.faults = verdicts["survived"] + verdicts["refused"] + verdicts["wrong"]
    case.survived, case.wrong_bits = case.faults - verdicts["wrong"], verdicts["wrong"]
    case.note = f"{verdicts['survived']} succeeded; {verdicts['refused']} ended with one line or killed, and then succeeded; syscalls.md"


def table(cases: list[Case]) -> str:
    lines = [
        "| case | faults injected | survived | lost samples (trained again) | wrong bits | seconds | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        wrong = "did not finish" if case.wrong_bits < 0 else case.wrong_bits
        lines.append(
            f"| {case.name} | {case.faults} | {case.survived} | {case.lost_samples} | {wrong} | {case.seconds:.0f} | {case.note} |"
        )
    return "\n".join(lines) + "\n"


def main(
    count: int = typer.Option(50, "--kills", help="with the case kill: kills, over all methods"),
    only: str = typer.Option(",".join(CASES), help="cases to run, separated by commas"),
    trials: int = typer.Option(500, help="with the case syscalls: trials; 0: all, which takes hours"),
    zero: int = typer.Option(2, help="ZeRO stage"),
    seed: int = typer.Option(0, help="of the random moments"),
    folder: Path = typer.Option(None, help="folder to work in, which is kept; default: a temporary one"),  # noqa: B008
    results: Path = typer.Option(RESULTS, help="where torture.json and torture.md go"),  # noqa: B008
    limit: float = typer.Option(600.0, help="seconds after which a start counts as hung"),
) -> None:
    """Runs the cases and writes the table. Exit code 1: a fault was not survived, or a bit is wrong."""
    chosen = only.split(",")
    if unknown := set(chosen) - set(CASES):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: the cases are {', '.join(CASES)}", param_hint="--only")
    with contextlib.ExitStack() as stack:
        work = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(work.resolve(), zero, limit)
        cases = []
        ways: dict[str, Callable[[Case], None]] = {
            "kill": lambda case: kill(bench, case, count, seed),
            "elastic": lambda case: elastic(bench, case),
            "flip": lambda case: flip(bench, case, seed),
            "disk": lambda case: disk(bench, case),
            "nan": lambda case: nan(bench, case),
            "freeze": lambda case: freeze(bench, case),
            "syscalls": lambda case: syscalls(bench, case, trials, results),
        }
        for name in chosen:
            case = Case(name)
            began = time.monotonic()
            ways[name](case)
            case.seconds = round(time.monotonic() - began, 1)
            case = Case(**json.loads(json.dumps(asdict(case)).replace(str(bench.folder), "")))
            cases.append(case)
            print(table([case]), flush=True)
        results.mkdir(parents=True, exist_ok=True)
        previous = results / "torture.json"
        kept = [Case(**old) for old in json.loads(previous.read_text())["cases"]] if previous.exists() else []
        cases = [old for old in kept if old.name not in {case.name for case in cases}] + cases
        cases.sort(key=lambda case: CASES.index(case.name))
        conditions = {
            "zero": zero,
            "ranks": 2,
            "steps": TOTAL,
            "checkpoint_every": EVERY,
            "global_batch": 16,
            "seed": seed,
        }
        found = {"conditions": conditions, "cases": [asdict(case) for case in cases]}
        previous.write_text(json.dumps(found, indent=1) + "\n")
        (results / "torture.md").write_text(HEADING.format(total=TOTAL, every=EVERY, zero=zero) + table(cases))
    if any(case.wrong_bits or case.survived != case.faults for case in cases):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
