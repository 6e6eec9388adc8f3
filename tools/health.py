"""Trains with each kind of fault and reads what the health check named; trains healthy runs and counts false alarms.

    python tools/health.py [--seeds 11,12,13] [--only WORD,WORD] [--write]

Thresholds were chosen on seed 1. Measure on other seeds: their generated faces and healthy runs are others.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

SIZE = 40
STEPS = 200
RESULTS = "results.jsonl"
RECIPE: dict[str, Any] = {
    "name": "run",
    "data": {"block": 8, "augmentation": "flip", "backend": "torch", "threads": 1},
    "backbone": {
        "name": "vit_nano",
        "embedding_dim": 128,
        "image_size": SIZE,
        "overrides": {"dim": 48, "depth": 2, "heads": 4, "patch": 10},
    },
    "method": {"name": "pco"},
    "phases": [{"name": "alignment", "global_batch": 64, "micro_batches": 1}],
    "optimizer": {"lr": 1e-3, "precision": "float32"},
    "schedule": {"total": "2000 steps", "warmup": "40 steps"},
    "checkpoint": {"every": "100000 steps"},
    "logging": {"trackers": []},
}


@dataclass
class Run:
    """One training, and what was named in it: cause -> step."""

    name: str
    seed: int
    values: dict[str, Any]
    data: Path
    overrides: list[str] = field(default_factory=list)
    expected: tuple[str, ...] = ()
    is_fault: bool = False
    named: dict[str, int] = field(default_factory=dict)
    error: str = ""


class _Named(Exception):
    """The expected cause was named, so the run need not go on."""


def make_data(folder: Path, seed: int, kind: str) -> Path:
    """Generated faces of 40 pixels: `plain`, `bgr` (channels exchanged), `grey`, `hard`, `uneven` (2 to 60 images)."""
    import cv2
    import numpy as np

    from lvtrain import randomness
    from lvtrain.data.index import IndexWriter
    from lvtrain.datasets.shard_writer import ShardWriter
    from lvtrain.datasets.synthetic.faces import DIFFICULTIES
    from lvtrain.datasets.synthetic.render import render_face

    path = folder / f"{kind}_{seed}"
    if (path / "dataset.json").exists():
        return path
    counts = [24] * 64 if kind != "uneven" else [2 + int(58 * 0.93**k) for k in range(64)]
    samples = [(identity, image) for identity, count in enumerate(counts) for image in range(count)]
    writer = IndexWriter(path)
    order = np.argsort(randomness.bits(seed, "health/order", np.arange(len(samples))))
    with ShardWriter(path, "shards/000000.tar") as shard:
        for number in order.tolist():
            identity, image = samples[number]
            drawn = render_face(1000 * seed, identity, image, DIFFICULTIES["hard" if kind == "hard" else "normal"])
            drawn = cv2.resize(drawn, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
            if kind == "grey":
                drawn = np.repeat(drawn.mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8)
            stored = drawn if kind == "bgr" else drawn[:, :, ::-1]  # cv2 takes BGR
            shard.add(f"{number:09d}", cv2.imencode(".jpg", stored)[1].tobytes(), identity)
    written = shard.written
    writer.add_shard(written.name, written.size, written.sha256, written.offsets, written.lengths, written.labels)
    writer.close([f"generated_{label}" for label in range(len(counts))], seed=seed, image_size=(SIZE, SIZE))
    return path


def train(run: Run, folder: Path, change: Any = None) -> None:
    """Trains in this process, by the real front door, until the expected cause is named or the steps are over."""
    import yaml

    from lvtrain.distributed import world as worlds
    from lvtrain.health import check
    from lvtrain.main import main
    from lvtrain.training.telemetry import Telemetry

    rank = int(os.environ.get("RANK", "0"))
    worlds.stop = lambda: None  # type: ignore[assignment]  # DeepSpeed cannot open a second group in a process
    folder.mkdir(parents=True, exist_ok=True)
    values = json.loads(json.dumps(run.values)) | {"seed": run.seed, "runs": str(folder)}
    values["data"]["path"] = str(run.data)
    (folder / f"recipe_{rank}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    command = ["--recipe", str(folder / f"recipe_{rank}.yaml"), "--ds_config", str(ROOT / "ds_configs" / "zero2.json")]
    if len(values["phases"]) == 1:
        command += [f"phases.0.end={{at_most: {STEPS} steps}}"]
    event, name_causes = Telemetry.event, check.name_causes

    def keep(signs: Any) -> Any:
        with open(folder / f"signs_{rank}.jsonl", "a") as file:
            file.write(json.dumps(asdict(signs)) + "\n")
        return name_causes(signs)

    def listen(self: Any, kind: str, **fields: Any) -> None:
        event(self, kind, **fields)
        cause = fields["cause"] if kind == "health" and fields["warning"] else None
        if kind == "first_loss" and not fields["agrees"]:
            cause = "first loss"
        if cause is not None:
            run.named.setdefault(cause, fields["step"])
            if cause in run.expected and self.world.size == 1:
                raise _Named
        if kind == "warning":
            run.named.setdefault(fields["text"].partition(":")[0], fields["step"])

    Telemetry.event, check.name_causes = listen, keep  # type: ignore[method-assign, assignment]
    with open(folder / f"log_{rank}.txt", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            with change(run.seed) if change else contextlib.nullcontext():
                code = main([*command, *run.overrides])
            run.error = "" if code == 0 else f"exit code {code}"
        except _Named:
            pass
        except Exception as error:  # a fault may break the training
            run.error = f"{type(error).__name__}: {error}"
        finally:
            Telemetry.event, check.name_causes = event, name_causes  # type: ignore[method-assign]


def _one_of_two(rank: int, port: int, runs: list[Run], folder: Path, answers: Any) -> None:
    """A rank of the runs that need two."""
    places = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})
    import torch

    from tools.health_runs.faults import FAULTS

    torch.set_num_threads(1)
    for run in runs:
        train(run, folder / _slug(run), FAULTS[run.name].change if run.is_fault else None)
        if rank == 0:
            answers.put((run.name, run.seed, run.named, run.error))


def train_on_two(runs: list[Run], folder: Path) -> None:
    """Trains runs on two ranks, one after the other."""
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    port = 20000 + os.getpid() % 10000
    ranks = [context.Process(target=_one_of_two, args=(rank, port, runs, folder, answers)) for rank in range(2)]
    for process in ranks:
        process.start()
    for run in runs:
        name, seed, run.named, run.error = answers.get(timeout=600)
        assert (name, seed) == (run.name, run.seed)
        report(run, folder)
    for process in ranks:
        process.join()


def _slug(run: Run) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in run.name) + f"_{run.seed}"


def report(run: Run, folder: Path) -> None:
    """Prints what was named, and adds it to the folder's results."""
    with open(folder / RESULTS, "a") as file:
        file.write(json.dumps(asdict(run) | {"data": str(run.data), "values": {}}) + "\n")
    causes = ", ".join(f"{cause} (step {step})" for cause, step in run.named.items()) or "nothing"
    right = not run.expected or any(cause in run.named for cause in run.expected)
    verdict = "MISSED" if not right else "FALSE ALARM" if not run.is_fault and run.named else "ok"
    print(f"{verdict:12s}{run.name} {run.seed}: {causes} {run.error}", flush=True)


def fault_runs(seed: int, only: list[str], data: Path) -> list[Run]:
    from tools.health_runs.faults import FAULTS

    runs = []
    for name, fault in FAULTS.items():
        if not only or any(word in name for word in only):
            runs.append(
                Run(name, seed, RECIPE, make_data(data, seed, fault.data), list(fault.overrides), fault.causes, True)
            )
    return runs


def main(
    seeds: Annotated[str, typer.Option(help="seeds of the runs with a fault, separated by commas")] = "11,12,13",
    healthy: Annotated[str, typer.Option(help="seeds of the healthy runs")] = "21",
    only: Annotated[str, typer.Option(help="only runs whose name has one of these words, separated by commas")] = "",
    write: Annotated[
        bool,
        typer.Option(help="write tools/results/health.json and .md; results of other runs stay"),
    ] = False,
    cost: Annotated[
        Path | None, typer.Option(help="file with the output of tools/benchmark.py health, for the page")
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(help="keep the runs, and the figures of each log line, in this folder")
    ] = None,
) -> None:
    """Trains with each kind of fault, and without one, and lists which faults the health check names."""
    import torch

    from tools.health_runs.faults import FAULTS
    from tools.health_runs.healthy import healthy_runs

    torch.set_num_threads(1)
    started = time.process_time()
    folder = keep or Path(tempfile.mkdtemp(prefix="health_"))
    folder.mkdir(parents=True, exist_ok=True)
    words = [word for word in only.split(",") if word]
    runs = [
        run for seed in map(int, filter(None, seeds.split(","))) for run in fault_runs(seed, words, folder / "data")
    ]
    for seed in map(int, filter(None, healthy.split(","))):
        runs += healthy_runs(seed, words, folder)
    pairs = [run for run in runs if (run.is_fault and FAULTS[run.name].ranks == 2) or run.name.startswith("two ranks")]
    for run in runs:
        if run not in pairs:
            train(run, folder / _slug(run), FAULTS[run.name].change if run.is_fault else None)
            report(run, folder)
    if pairs:
        train_on_two(pairs, folder)
    print(f"{time.process_time() - started:.0f} CPU seconds in this process")
    if write:
        from tools.health_runs.table import write_results

        lines = [Run(**json.loads(line)) for line in (folder / RESULTS).read_text().splitlines()]
        latest = {(run.name, run.seed): run for run in lines}
        measured = json.loads(cost.read_text()) if cost else None
        write_results(list(latest.values()), ROOT / "tools" / "results", measured)
    if keep is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    typer.run(main)
