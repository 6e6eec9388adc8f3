"""Ill-treats a small quick-start run in every way we know and counts what it cost: python tools/torture.py [--kills 50] [--only kill,flip]

(a) `kill`: kill -9 at random instants, also inside saves, until done; (b) `elastic`: a chain of world sizes; (c) `flip`: a byte of the newest
checkpoint; (d) `disk`: the disk fills up (a small tmpfs; needs root); (e) `nan`: outputs that are not finite; (f) `freeze`: a rank stands still.
Each ends with a finished run whose checkpoint is compared, tensor by tensor and byte by byte, with that of a run left in peace.

Results go to tools/results/torture.json and torture.md. The run is lvtrain/recipes/quickstart.yaml, smaller and shorter, on generated faces, on 2
gloo ranks. Ranks are forked from a process that has imported everything already, so that fifty restarts take minutes; they run
`lvtrain.main.main` as any launcher would.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import typer  # noqa: E402 - the path must be set first

RESULTS = ROOT / "tools" / "results"
TOTAL, EVERY = 90, 3
SMALL = [
    "backbone.overrides={dim: 32, depth: 2, heads: 2, drop_path: 0.1}",
    "backbone.embedding_dim=32",
    "method.window=3",
    *(f"phases.{i}.{key}" for i in range(3) for key in ("global_batch=16", "virtual_batches=4")),
    "phases.alignment.end={at_most: 30 steps}",
    "phases.stabilisation.end={at_most: 30 steps}",
    f"schedule.total={TOTAL} steps",
    "schedule.warmup=5 steps",
    f"checkpoint.every={EVERY} steps",
    "logging={every: 1, tensorboard: false}",
    "evaluation.benchmarks={}",
    "data.block=8",
]
HEADING = """# Torture

`python tools/torture.py`: the quick start, shortened to {total} steps of 16 images with a checkpoint every {every}, on 2 gloo ranks under ZeRO-{zero}; every
final state is compared with that of a run left in peace, tensor by tensor, byte by byte, and so is what every step logged.

"""
# imported once, by the process the ranks are forked from: a start costs a tenth of a second, not ten
PRELOADED = ["lvtrain.training.session", "lvtrain.training.dry_run", "sklearn.metrics", "nvidia.dali", "torch._dynamo"]
POINTS = (
    "save.after_mkdir",
    "save.mid_file",
    "save.after_files",
    "save.before_vote",
    "save.before_manifest",
    "save.mid_manifest",
    "save.before_rename",
    "save.after_rename",
    "retention.renamed",
    "save.after_commit",
)


# ------------------------------------------------------------------------------------------------------------ starting ranks


def _rank(rank: int, size: int, port: int, arguments: list[str], environment: dict[str, str], log: str) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    places = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()} | environment)
    os.chdir(ROOT)
    import torch

    from lvtrain.main import main

    torch.set_num_threads(1)
    sys.exit(main(arguments))


def start(size: int, arguments: list[str], log: Path, environment: dict[str, str] | None = None) -> list[Any]:
    """`size` ranks of `lvtrain/main.py ARGUMENTS`; each is a multiprocessing Process, output goes to `log`."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rest = (size, port, arguments, environment or {}, str(log))
    processes = [context.Process(target=_rank, args=(rank, *rest)) for rank in range(size)]
    for process in processes:
        process.start()
    return processes


def end(processes: list[Any], seconds: float) -> list[int | None]:
    """Waits for the ranks; when one fails, the others get a moment and are killed, as launchers do. Exit codes by rank."""
    limit = time.monotonic() + seconds
    while any(process.is_alive() for process in processes):
        failed = any(process.exitcode not in (None, 0, 75) for process in processes)
        if failed:
            limit = min(limit, time.monotonic() + 3.0)
        if time.monotonic() > limit:
            break
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


# ------------------------------------------------------------------------------------------------------------------ the run


@dataclass
class Case:
    """One way of ill-treating and what came of it."""

    name: str
    faults: int = 0
    survived: int = 0
    lost_samples: int = 0
    wrong_bits: int = 0
    seconds: float = 0.0
    note: str = ""
    details: list[dict[str, Any]] = field(default_factory=list)


class Bench:
    """Data, recipe and the run left in peace, and how a tortured run compares with it."""

    def __init__(self, folder: Path, zero: int, limit: float, *overrides: str) -> None:
        self.folder, self.zero, self.limit, self.overrides = folder, zero, limit, overrides
        data = folder / "faces"
        if not data.exists():
            make = [
                sys.executable,
                str(ROOT / "tools" / "synth_faces.py"),
                str(data),
                "--identities",
                "24",
                "--images",
                "12",
            ]
            subprocess.run(
                [*make, "--heldout", "4", "--pairs", "20", "--seed", "3"], check=True, cwd=ROOT, capture_output=True
            )

    def arguments(self, runs: Path, *more: str) -> list[str]:
        fixed = ["--recipe", "lvtrain/recipes/quickstart.yaml", "--ds_config", f"ds_configs/zero{self.zero}.json"]
        return [*fixed, *SMALL, f"data.path={self.folder / 'faces' / 'train'}", f"runs={runs}", *self.overrides, *more]

    def start(self, runs: Path, size: int = 2, fault: str = "", *more: str) -> list[Any]:
        runs.mkdir(parents=True, exist_ok=True)
        environment = {"LVTRAIN_FAULT": fault}
        return start(size, self.arguments(runs, *more), self.folder / f"{runs.name}.txt", environment)

    def run(self, runs: Path, size: int = 2, fault: str = "", *more: str) -> list[int | None]:
        return end(self.start(runs, size, fault, *more), self.limit)

    def said(self, runs: Path) -> str:
        return (self.folder / f"{runs.name}.txt").read_text()

    def peace(self) -> Path:
        """A run nobody disturbed, made once."""
        runs = self.folder / "peace"
        if not (runs / "done").exists():
            codes = self.run(runs)
            if codes != [0, 0]:
                raise SystemExit(f"the undisturbed run failed with {codes}:\n{self.said(runs)[-3000:]}")
            (runs / "done").touch()
        return runs

    def finish(self, case: Case, runs: Path, size: int = 2) -> None:
        """Runs on undisturbed to the end and counts tensors (and telemetry rows) that are not the same, byte by byte, as the peaceful run's."""
        codes = self.run(runs, size)
        if codes != [0] * size:
            case.wrong_bits = -1
            case.note = f"did not finish: {codes}; {self.said(runs).strip().splitlines()[-1]}"
            return
        ours, theirs = contents(run_folder(runs)), contents(run_folder(self.peace()))
        differ = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
        case.wrong_bits += len(differ)
        case.note = case.note or (f"differ: {sorted(differ)[:3]}" if differ else "")


def run_folder(runs: Path) -> Path:
    return runs / "quickstart"


def rows(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics."""
    path = folder / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # cut short by a kill
            found.append(json.loads(line))
    return found


def contents(folder: Path) -> dict[str, Any]:
    """The final checkpoint's tensors as bytes (rows whole, whatever the ranks that wrote them), and what every step logged of the training."""
    from lvtrain.training.checkpoint import open_weights

    reader = open_weights(folder).reader
    found: dict[str, Any] = {}
    for name in reader.names:
        shape = reader.shape(name)
        tensor = reader.rows(name, 0, shape[0]) if reader.is_rows(name) else reader.replicated(name)
        found[name] = (str(tensor.dtype), tuple(shape), tensor.contiguous().flatten().view(_bytes()).numpy().tobytes())
    for row in rows(folder):
        found[f"metrics of step {row['step']}"] = (
            row["loss"],
            row["cos2"],
            row["cos2_window"],
            row["grad_norm"],
            row["lr"],
        )
    return found


def _bytes() -> Any:
    import torch

    return torch.uint8


def last_step(runs: Path) -> int:
    found = rows(run_folder(runs))
    return found[-1]["step"] if found else 0


# ------------------------------------------------------------------------------------------------------------------ the cases


def kill(bench: Bench, case: Case, kills: int, seed: int) -> None:
    """(a) kill -9 of one rank or all, at a random instant or at a random point of a save, until there were enough kills and the run is done."""
    chance = random.Random(seed)
    runs = bench.folder / "kill"
    before = 0
    while case.faults < kills and case.faults < 10 * kills:
        inside = chance.random() < 0.5
        victim = chance.choice(["0", "1", "*"])
        at_once = last_step(runs)
        detail: dict[str, Any] = {"victim": victim}
        if inside:
            step = before + EVERY * chance.randint(1, 2)
            point = chance.choice(POINTS)
            victim = "0" if "manifest" in point or "rename" in point else victim
            detail |= {"point": point, "step": step}
            codes = end(bench.start(runs, 2, f"{point}:{victim}:{step}:sigkill"), bench.limit)
        else:
            processes = bench.start(runs)
            delay = chance.uniform(0.0, 6.0)
            # half of the delays count from the first step, so that training is hit as well as starting up
            if chance.random() < 0.7:
                _until(
                    lambda processes=processes, at_once=at_once: resumed_and_moving(runs, processes, at_once),
                    bench.limit,
                )
            time.sleep(delay)
            for process in [processes[int(victim)]] if victim != "*" else processes:
                process.kill()
            detail |= {"delay": round(delay, 2)}
            codes = end(processes, 20.0)
        if codes == [0, 0]:
            # the run was over before the blow fell: start another
            bench_compare(bench, case, runs)
            shutil.rmtree(runs)
            before = 0
            continue
        reached, before = last_step(runs), newest_committed(runs)
        if -9 not in codes:
            detail["note"] = f"ended with {codes}: {bench.said(runs).strip().splitlines()[-1][:200]}"
        case.faults += 1
        case.survived += 1
        case.lost_samples += max(0, reached - before) * 16
        case.details.append(detail | {"codes": codes, "reached": reached, "committed": before})
        print(f"kill {case.faults}: {case.details[-1]}", flush=True)
    bench.finish(case, runs)


def bench_compare(bench: Bench, case: Case, runs: Path) -> None:
    ours, theirs = contents(run_folder(runs)), contents(run_folder(bench.peace()))
    case.wrong_bits += sum(ours.get(name) != theirs.get(name) for name in ours.keys() | theirs.keys())


def resumed_and_moving(runs: Path, processes: list[Any], before: int) -> bool:
    return last_step(runs) != before or not all(process.is_alive() for process in processes)


def newest_committed(runs: Path) -> int:
    from lvtrain.training import checkpoint_files as files
    from lvtrain.training import checkpoint_layout as layout

    steps = [files.step_of(path) or 0 for path in layout.committed(run_folder(runs) / "checkpoints")]
    return max(steps, default=0)


def elastic(bench: Bench, case: Case) -> None:
    """(b) stopped and resumed through world sizes 2 -> 1 -> 4 -> 2, a phase change on the way."""
    runs = bench.folder / "elastic"
    for size, stop in ((2, 17), (1, 38), (4, 61)):
        codes = bench.run(runs, size, f"loop.step:0:{stop}:sigterm")
        case.faults += 1
        case.survived += codes == [75] * size
        case.details.append({"ranks": size, "codes": codes, "stopped_at": newest_committed(runs)})
    codes = bench.run(runs, 2)
    case.survived += codes == [0, 0]
    case.faults += 1
    ours, theirs = rows(run_folder(runs)), rows(run_folder(bench.peace()))
    apart = [abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(ours, theirs)]
    changed = case.details[0]["stopped_at"]  # the first step on another number of ranks starts from the same bits
    same_samples = [row["samples_seen"] for row in ours] == [row["samples_seen"] for row in theirs]
    case.wrong_bits = 0 if same_samples and apart[changed] < 1e-6 and max(apart) < 1e-2 else 1
    case.note = (
        f"loss of the first step on other ranks within {apart[changed]:.0e} (relative) of 2 ranks throughout, "
        f"of all {len(ours)} steps within {max(apart):.0e}; bits are not promised here"
    )


def flip(bench: Bench, case: Case, seed: int) -> None:
    """(c) one byte of one file of the newest checkpoint, each kind of file in turn."""
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
    bench.finish(case, runs)
    put_aside = len(list((run_folder(runs) / "checkpoints").glob("damaged_*")))
    case.survived = case.faults if case.wrong_bits == 0 else 0
    case.note = case.note or f"{put_aside} checkpoints put aside"


def disk(bench: Bench, case: Case) -> None:
    """(d) the run folder lies on a tmpfs with room for two checkpoints only; then it is made larger."""
    if os.geteuid() != 0:
        case.note = "not run: mounting a tmpfs needs root"
        return
    one = sum(
        path.stat().st_size for path in next((run_folder(bench.peace()) / "checkpoints").glob("step_*")).iterdir()
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
        told = [line for line in bench.said(runs).splitlines() if "lvtrain: error" in line]
        case.details.append({"codes": codes, "told": told[-1:], "committed": newest_committed(runs)})
        stopped = codes == [2, 2] and bool(told) and newest_committed(runs) > 0
        subprocess.run(["mount", "-o", f"remount,size={64 * one + (64 << 20)}", str(runs)], check=True)
        case.lost_samples = max(0, last_step(runs) - newest_committed(runs)) * 16
        bench.finish(case, runs)
        case.survived = int(stopped and case.wrong_bits == 0)
        case.note = case.note or (told[-1] if told else "")
    finally:
        subprocess.run(["umount", "-l", str(runs)], check=False)


def nan(bench: Bench, case: Case) -> None:
    """(e) one rank's outputs are NaN in one step (skipped, the run goes on), then in three in a row (stopped, with a checkpoint from before)."""
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
    bench.finish(case, runs)
    case.survived += int(stopped and case.wrong_bits == 0)


def freeze(bench: Bench, case: Case) -> None:
    """(f) a rank is stopped (SIGSTOP) in the middle: the others end within the collective timeout, and the next start goes on."""
    runs = bench.folder / "freeze"
    started = time.monotonic()
    codes = end(bench.start(runs, 2, "loop.step:1:25:sigstop", "safety.collective_timeout=20"), 240.0)
    case.faults = 1
    case.details.append({"codes": codes, "seconds_to_end": round(time.monotonic() - started, 1)})
    reached, committed = last_step(runs), newest_committed(runs)
    case.lost_samples = max(0, reached - committed) * 16
    ended = codes[0] not in (None, 0, -9)
    logs = (
        sorted(path.name for path in (run_folder(runs) / "logs").glob("*"))
        if (run_folder(runs) / "logs").exists()
        else []
    )
    case.details.append({"logs": logs})
    bench.finish(case, runs)
    case.survived = int(ended and case.wrong_bits == 0)


def _until(condition: Callable[[], bool], seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.05)


# --------------------------------------------------------------------------------------------------------------------- report


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
    kills: int = typer.Option(50, help="kill -9s of case (a)"),
    only: str = typer.Option("kill,elastic,flip,disk,nan,freeze", help="cases to run"),
    zero: int = typer.Option(2, help="ZeRO stage"),
    seed: int = typer.Option(0, help="of the random instants"),
    folder: Path = typer.Option(None, help="work here and keep it; a temporary folder otherwise"),  # noqa: B008
    results: Path = typer.Option(RESULTS, help="where torture.json and torture.md go"),  # noqa: B008
    limit: float = typer.Option(600.0, help="seconds one start may take before it counts as hung"),
) -> None:
    """Runs the cases and writes the table; exit status 1 if a fault was not survived or a bit is wrong."""
    with contextlib.ExitStack() as stack:
        work = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(work.resolve(), zero, limit)
        bench.peace()
        cases = []
        ways: dict[str, Callable[[Case], None]] = {
            "kill": lambda case: kill(bench, case, kills, seed),
            "elastic": lambda case: elastic(bench, case),
            "flip": lambda case: flip(bench, case, seed),
            "disk": lambda case: disk(bench, case),
            "nan": lambda case: nan(bench, case),
            "freeze": lambda case: freeze(bench, case),
        }
        for name in only.split(","):
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
        cases.sort(key=lambda case: list(ways).index(case.name))
        conditions = {
            "zero": zero,
            "ranks": 2,
            "steps": TOTAL,
            "checkpoint_every": EVERY,
            "global_batch": 16,
            "seed": seed,
        }
        previous.write_text(
            json.dumps({"conditions": conditions, "cases": [asdict(case) for case in cases]}, indent=1) + "\n"
        )
        (results / "torture.md").write_text(HEADING.format(total=TOTAL, every=EVERY, zero=zero) + table(cases))
    if any(case.wrong_bits or case.survived != case.faults for case in cases):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
