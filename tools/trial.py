"""A small run of the real trainer on forked ranks. It is started, ended, and compared byte by byte with an undisturbed one.

The run is lvtrain/recipes/quickstart.yaml, smaller and shorter, on generated faces. Ranks are forked from a process that
has imported everything, so fifty restarts take minutes. They run `lvtrain.main.main`, as under any launcher.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOTAL, EVERY = 90, 3
SMALL = [
    "backbone.overrides={dim: 32, depth: 2, heads: 2, drop_path: 0.1}",
    "backbone.embedding_dim=32",
    "method.window=3",
    *(f"phases.{i}.{key}" for i in range(3) for key in ("global_batch=16", "micro_batches=4")),
    "phases.alignment.end={at_most: 30 steps}",
    "phases.stabilisation.end={at_most: 30 steps}",
    f"schedule.total={TOTAL} steps",
    "schedule.warmup=5 steps",
    f"checkpoint.every={EVERY} steps",
    "logging={every: 1, trackers: []}",
    "evaluation.benchmarks={}",
    "data.block=8",
]
# imported once, by the process that the ranks are forked from: a start takes a tenth of a second, not ten
PRELOADED = ["tools.preload"]
OF_MACHINE = ("time", "images_per_second", "data_wait", "memory_gb")  # columns of metrics that no two runs share


def _rank(rank: int, size: int, port: int, arguments: list[str], environment: dict[str, str], log: str) -> None:
    gc.freeze()  # what was imported before the fork need not be looked through again
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.setpgid(0, 0)  # a kill ends the rank and its children
    places = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()} | environment)
    os.chdir(ROOT)
    import torch

    from lvtrain.main import main

    torch.set_num_threads(1)
    sys.exit(main(arguments))


def start(size: int, arguments: list[str], log: Path, environment: dict[str, str] | None = None) -> list[Any]:
    """Starts `size` ranks of `lvtrain/main.py ARGUMENTS`, as processes whose output goes to `log`."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as main.py says it, before torch is imported
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


def kill(process: Any) -> None:
    """SIGKILL of a rank and its children."""
    with contextlib.suppress(ProcessLookupError):  # it has ended, or is so young that it is not a group yet
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def end(processes: list[Any], seconds: float) -> list[int | None]:
    """Waits for the ranks, and returns their exit codes. If one fails, the others are killed soon, as launchers do."""
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


class Bench:
    """Data, recipe and the undisturbed run that others are compared with.

    Args:
        folder: to work in.
        zero: ZeRO stage.
        limit: seconds after which a start counts as hung.
        overrides: of the recipe, besides `small`.
        recipe: name of a quick start's recipe.
        small: overrides that make it smaller and shorter.
        data: folder of the generated faces, made if it is missing; default: `faces` in `folder`.
    """

    def __init__(
        self,
        folder: Path,
        zero: int,
        limit: float,
        *overrides: str,
        recipe: str = "quickstart",
        small: list[str] = SMALL,
        data: Path | None = None,
    ) -> None:
        self.folder, self.zero, self.limit, self.overrides = folder, zero, limit, overrides
        self.recipe, self.small = recipe, small
        self.data = data = data or folder / "faces"
        folder.mkdir(parents=True, exist_ok=True)
        if not data.exists():
            size = ["--identities", "24", "--images", "12", "--heldout", "4", "--pairs", "20", "--seed", "3"]
            make = [sys.executable, str(ROOT / "tools" / "synth_faces.py"), str(data), *size]
            subprocess.run(make, check=True, cwd=ROOT, capture_output=True)

    def arguments(self, runs: Path, *more: str) -> list[str]:
        fixed = ["--recipe", f"lvtrain/recipes/{self.recipe}.yaml", "--ds_config", f"ds_configs/zero{self.zero}.json"]
        named = [f"data.path={self.data / 'train'}", f"runs={runs}", "name=quickstart"]
        return [*fixed, *self.small, *named, *self.overrides, *more]

    def start(self, runs: Path, size: int = 2, fault: str = "", *more: str) -> list[Any]:
        runs.mkdir(parents=True, exist_ok=True)
        environment = {"LVTRAIN_FAULT": fault}
        return start(size, self.arguments(runs, *more), self.folder / f"{runs.name}.txt", environment)

    def run(self, runs: Path, size: int = 2, fault: str = "", *more: str) -> list[int | None]:
        return end(self.start(runs, size, fault, *more), self.limit)

    def output(self, runs: Path) -> str:
        return (self.folder / f"{runs.name}.txt").read_text()

    def last_line(self, runs: Path) -> str:
        return (self.output(runs).strip().splitlines() or ["(no output)"])[-1]

    def undisturbed(self) -> Path:
        """Folder of the undisturbed run, which is made once."""
        runs = self.folder / "undisturbed"
        if not (runs / "done").exists():
            codes = self.run(runs)
            if codes != [0, 0]:
                raise SystemExit(f"the undisturbed run failed with {codes}:\n{self.output(runs)[-3000:]}")
            (runs / "done").touch()
        return runs

    def differing(self, runs: Path) -> list[str]:
        """Names of the tensors and logged rows that differ, byte by byte, from the undisturbed run."""
        ours, theirs = contents(run_folder(runs)), contents(run_folder(self.undisturbed()))
        return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def run_folder(runs: Path) -> Path:
    return runs / "quickstart"


def rows(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics."""
    path = folder / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # cut short by a kill
            found.append(json.loads(line))
    return found


def contents(folder: Path) -> dict[str, Any]:
    """The final checkpoint's tensors as bytes, with split ones joined, and what every step logged."""
    import torch

    from lvtrain.checkpoint.checkpoints import open_weights

    reader = open_weights(folder).reader
    found: dict[str, Any] = {}
    for name in reader.names:
        shape = reader.shape(name)
        tensor = reader.rows(name, 0, shape[0]) if reader.is_rows(name) else reader.replicated(name)
        found[name] = (
            str(tensor.dtype),
            tuple(shape),
            tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes(),
        )
    for row in rows(folder):
        found[f"metrics of step {row['step']}"] = {name: row[name] for name in row.keys() - set(OF_MACHINE)}
    return found


def last_step(runs: Path) -> int:
    found = rows(run_folder(runs))
    return found[-1]["step"] if found else 0


def newest_committed(runs: Path) -> int:
    from lvtrain.checkpoint import files as files
    from lvtrain.checkpoint import plan as layout

    steps = [files.step_of(path) or 0 for path in layout.committed(run_folder(runs) / "checkpoints")]
    return max(steps, default=0)
