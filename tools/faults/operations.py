"""The operations of the sweep at the smallest size: a save, a resume, a pack and an evaluation, by their commands.

They run in processes that are forked from one that has imported everything. So a start takes half a second, not fifteen.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.faults import shim
from tools.trial import ROOT, contents

RECIPE = """
name: tiny
seed: 0
data: {{path: {faces}/train, block: 8, augmentation: flip, backend: torch, threads: 1}}
backbone: {{name: vit_nano, embedding_dim: 16, overrides: {{dim: 16, depth: 1, heads: 1}}}}
method: {{name: pco, window: 2}}
phases: [{{name: alignment, global_batch: 8, micro_batches: 2, sample_rate: 0.5}}]
optimizer: {{lr: 1.0e-3, precision: float32}}
schedule: {{total: {steps} steps, warmup: 1 steps}}
checkpoint: {{every: 1 steps}}
logging: {{every: 1, trackers: []}}
evaluation: {{benchmarks: {{}}}}
"""
GRACE = 1.0  # seconds the other ranks have after one has failed, as under a launcher


@dataclass(frozen=True)
class Operation:
    """A command of the sweep.

    Attributes:
        name: of the operation.
        tool: `lvtrain`, or a file of `tools/`.
        prepare: `prepare(bench, work, size)` fills the empty folder `work`.
        arguments: `arguments(bench, work, workers)` are the tool's.
        read: `read(work)` is what must be the same with and without a fault.
        is_repeatable: whether the command may be given again after it has ended well.
    """

    name: str
    tool: str
    prepare: Callable[[Bench, Path, int], None]
    arguments: Callable[[Bench, Path, int], list[str]]
    read: Callable[[Path], dict[str, Any]] = lambda work: {}
    is_repeatable: bool = True


# Starting a process also asks all others for their exit codes. If two threads ask at once, one of them gets 255.
_POLLING = threading.Lock()


def _codes(processes: list[Any]) -> list[int | None]:
    """Exit codes; None of those that still run."""
    with _POLLING:
        return [process.exitcode for process in processes]


class Bench:
    """What the operations start from, made once in `folder`: faces (shards and image files), a stopped and a finished run."""

    def __init__(self, folder: Path, limit: float = 150.0) -> None:
        self.folder, self.limit = folder, limit
        self.expected: dict[tuple[str, int], tuple[dict[str, Any], set[str]]] = {}  # results, by operation and ranks
        self.making = threading.RLock()  # held while what trials share is made
        self.sources = folder / "sources"
        self.faces, self.photos = self.sources / "faces", self.sources / "photos"
        self.sources.mkdir(parents=True, exist_ok=True)
        _serve(shim.build(folder))
        if not self.faces.exists():
            making = self.folder / "making_faces"
            size = [
                "--identities",
                "6",
                "--images",
                "4",
                "--heldout",
                "4",
                "--pairs",
                "20",
                "--seed",
                "3",
                "--workers",
                "1",
            ]
            codes, output = self.run(
                Operation("faces", "synth_faces", _nothing, lambda *_: [str(self.faces), *size]), making
            )
            if codes != [0]:
                raise SystemExit(f"no faces were made, {codes}:\n{output}")
            self._photos()
        for name, steps in (("save", 2), ("resume", 4)):
            (self.sources / f"{name}.yaml").write_text(RECIPE.format(faces=self.faces, steps=steps))

    def run(
        self,
        operation: Operation,
        work: Path,
        size: int = 1,
        plan: Path | None = None,
        victim: int = 0,
        fault: str = "",
    ) -> tuple[list[int | None], str]:
        """Runs an operation.

        Args:
            operation: to run.
            work: its folder.
            size: ranks; of a pack, workers.
            plan: file of the fault; None = no fault.
            victim: the rank that the plan applies to.
            fault: `LVTRAIN_FAULT`.

        Returns:
            Exit codes (None: still running at the limit), and the output.
        """
        log = work.with_suffix(".log")
        log.unlink(missing_ok=True)
        is_pack = operation.tool == "pack_dataset"
        ranks = 1 if is_pack else size
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {
            "WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "LVTRAIN_FAULT": fault,
            "COLUMNS": 300,
        }
        context = multiprocessing.get_context("forkserver")
        processes = []
        for rank in range(ranks):
            own = {**common, "RANK": rank, "LOCAL_RANK": rank}
            attached = None if rank != victim and not is_pack else plan
            if is_pack and victim and plan:  # the plan applies to the workers, which attach when they are spawned
                attached, own["INTERPOSE_PLAN"] = None, str(plan)
            arguments = (operation.tool, operation.arguments(self, work, size), own, str(log), str(attached or ""))
            processes.append(context.Process(target=_enter, args=arguments))
        with _POLLING:
            for process in processes:
                process.start()
        limit, failed = time.monotonic() + self.limit, False
        while None in (now := _codes(processes)) and time.monotonic() < limit:
            if not failed and any(code not in (None, 0, 75) for code in now):
                failed, limit = True, min(limit, time.monotonic() + GRACE)
            time.sleep(0.01)
        hung = [process for process, code in zip(processes, _codes(processes)) if code is None and not failed]
        for process in hung:
            os.kill(process.pid or 0, signal.SIGUSR1)  # writes its stacks to the log
            time.sleep(0.5)
        with _POLLING:
            for process in processes:
                process.kill()
                process.join()
        codes = [None if process in hung else code for process, code in zip(processes, _codes(processes))]
        return codes, log.read_text(errors="replace") if log.exists() else ""

    def fresh(self, operation: Operation, work: Path, size: int) -> None:
        """Prepares `work` for the operation on `size` ranks."""
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        operation.prepare(self, work, size)

    def result(self, operation: Operation, work: Path) -> dict[str, Any]:
        """What the operation left, read by a fork.

        Raises:
            RuntimeError: it cannot be read.
        """
        receive, send = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("forkserver").Process(
            target=_read, args=(operation.name, str(work), send)
        )
        with _POLLING:
            process.start()
        send.close()
        try:
            found = receive.recv()
        except EOFError:
            found = f"the reader ended with {process.exitcode}"
        process.join()
        if isinstance(found, str):
            raise RuntimeError(found)
        return dict(found)

    def earlier_run(self, name: str, size: int) -> Path:
        """The runs folder of a `done` or `stopped` run on `size` ranks, made once."""
        runs = self.sources / f"{name}{size}"
        with self.making:
            if not runs.exists():
                operation, fault, code = {"done": (SAVE, "", 0), "stopped": (RESUME, "loop.step:*:1:sigterm", 75)}[name]
                work = self.folder / "making"
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                codes, output = self.run(operation, work, size, fault=fault)
                if codes != [code] * size:
                    raise SystemExit(f"the {name} run failed with {codes}:\n{output}")
                shutil.move(work / "runs", runs)
        return runs

    def _photos(self) -> None:
        """Writes the held-out faces as image files: JPEGs, one PNG and one file that is not an image."""
        from lvtrain.data.shards import ShardDataset

        dataset = ShardDataset(self.faces / "heldout")
        for sample in range(len(dataset)):
            data, label = dataset.read(sample)
            path = self.photos / f"person{label}" / f"{sample}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        from PIL import Image

        first = next(iter(sorted(self.photos.rglob("*.jpg"))))
        Image.open(first).save(first.with_suffix(".png"))
        first.write_bytes(b"not an image")


def _nothing(bench: Bench, work: Path, size: int) -> None:
    pass


def _copy(name: str) -> Callable[[Bench, Path, int], Any]:
    return lambda bench, work, size: shutil.copytree(bench.earlier_run(name, size), work / "runs") and None


def _train(name: str) -> Callable[[Bench, Path, int], list[str]]:
    return lambda bench, work, size: [
        *(
            "--recipe",
            str(bench.sources / f"{name}.yaml"),
            "--ds_config",
            "ds_configs/zero2.json",
            f"runs={work / 'runs'}",
        )
    ]


def _trained(work: Path) -> dict[str, Any]:
    return contents(work / "runs" / "tiny")


def _packed(work: Path) -> dict[str, Any]:
    from lvtrain.datasets.packing.pack import FINISHED  # a folder that may stay, and that the next start removes

    out = work / "out"
    found = {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.rglob("*")
        if path.is_file() and FINISHED not in path.parts
    }
    manifest = json.loads((out / "dataset.json").read_text())
    manifest.pop("created", None)
    return {**found, "dataset.json": manifest}


def _evaluated(work: Path) -> dict[str, Any]:
    found = json.loads((work / "runs" / "tiny" / "evaluated" / "evaluation.json").read_text())
    found.pop("model")
    return found


def _evaluate(task: str) -> Callable[[Bench, Path, int], list[str]]:
    return lambda bench, work, size: [
        *(str(work / "runs" / "tiny"), "--benchmark", task.format(faces=bench.faces), "--batch", "16", "--cpu")
    ]


SAVE = Operation("save", "lvtrain", _nothing, _train("save"), _trained)
RESUME = Operation("resume", "lvtrain", _copy("stopped"), _train("resume"), _trained)
PACK = Operation(
    "pack",
    "pack_dataset",
    _nothing,
    lambda bench, work, workers: [
        str(bench.photos),
        str(work / "out"),
        "--kind",
        "folder",
        "--workers",
        str(workers),
        "--samples-per-shard",
        "8",
    ],
    _packed,
    is_repeatable=False,
)
EVALUATE = Operation("evaluate", "evaluate", _copy("done"), _evaluate("pairs:all_pairs:{faces}/heldout"), _evaluated)
# reads a `.bin` file, and draws: that takes eight times as long
DRAW = Operation("draw", "evaluate", _copy("done"), _evaluate("heldout:{faces}/heldout.bin"), _evaluated)
OPERATIONS = {operation.name: operation for operation in (SAVE, RESUME, PACK, EVALUATE, DRAW)}


def _serve(library: Path) -> None:
    """Starts the process that the others are forked from, with the library preloaded.

    The first fork starts it, with the environment of that moment.
    """
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # as a command says it, before torch is imported
        "LD_PRELOAD": str(library),
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tools.faults.preload"])
    process = context.Process(target=_fork)
    process.start()
    process.join()
    del os.environ["LD_PRELOAD"]
    if process.exitcode:
        raise SystemExit("the processes of the sweep cannot be started")


def _fork() -> None:
    pass


def _read(name: str, work: str, send: Any) -> None:
    """Runs in the forked process."""
    try:
        send.send(OPERATIONS[name].read(Path(work)))
    except Exception as error:  # a result that cannot be read differs
        send.send(f"{type(error).__name__}: {error}")


def _enter(tool: str, arguments: list[str], environment: dict[str, Any], log: str, plan: str) -> None:
    """Runs in the forked process."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.chdir(ROOT)
    faulthandler.register(signal.SIGUSR1)
    if plan:
        shim.attach(Path(plan))
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(_call(tool, arguments))


def _call(tool: str, arguments: list[str]) -> int:
    import importlib

    import torch
    import typer

    torch.set_num_threads(1)
    module = importlib.import_module("lvtrain.main" if tool == "lvtrain" else f"tools.{tool}")
    if tool == "lvtrain":
        return int(module.main(arguments))
    sys.argv = [tool, *arguments]
    typer.run(module.main)
    return 0
