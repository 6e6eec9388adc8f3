"""What the health check costs in a training: all its work as a share of the training's CPU time, and whether it waits for the device."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tools.benchmarks.waits import host_waits

ROOT = Path(__file__).resolve().parent.parent.parent
_FIRST = 3  # steps that are not counted: memory is allocated, kernels are chosen


def run(
    name: str = "vit_nano",
    batch: int = 64,
    accumulation: int = 2,
    steps: int = 40,
    every: int = 10,
    data: Path | None = None,
) -> dict[str, Any]:
    """Share of a training's CPU time that each part of the health check takes, log lines included.

    It trains by the front door: PCO's first phase, as the quick start. Then it counts for a few steps how often the check would wait for a GPU.
    Log lines may wait, because there the device is waited for anyway.

    every: steps between log lines, before each of which gradients and movement are measured.

    data: a dataset folder; without it, 64 identities are generated.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = data or _generated(Path(folder))
        costs = _train(path, Path(folder), name, batch, accumulation, steps, every, _Costs())
        waits = _train(path, Path(folder), name, batch, accumulation, _FIRST + every, every, _Waits())
    spent, total = costs.spent, costs.total
    return {
        "subject": "health",
        "name": name,
        "batch": batch,
        "accumulation": accumulation,
        "log_every": every,
        "steps": costs.steps,
        "step_ms": round(1e3 * total / costs.steps, 2),
        "signs_ms": round(1e3 * sum(spent.values()) / costs.steps, 3),
        "ratio": round(sum(spent.values()) / total, 5),
        "ratio_by_part": {
            part: round(seconds / total, 5) for part, seconds in sorted(spent.items(), key=lambda each: -each[1])
        },
        "host_waits": dict(waits.found),
    }


def _generated(folder: Path) -> Path:
    command = [sys.executable, str(ROOT / "tools" / "synth_faces.py"), str(folder / "faces")]
    size = ["--identities", "64", "--images", "16", "--heldout", "4", "--pairs", "20"]
    subprocess.run([*command, *size], check=True, capture_output=True)
    return folder / "faces" / "train"


class _Costs:
    """Adds up the CPU time of the check's parts in the thread that calls them, and that of the whole process."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.begun, self.last, self.steps = 0.0, 0.0, -_FIRST - 1

    def begin_step(self) -> None:
        self.steps += 1
        self.last = time.process_time()
        if self.steps == 0:
            self.begun = self.last
            self.spent.clear()

    @contextlib.contextmanager
    def part(self, name: str) -> Any:
        begun = time.thread_time()
        yield
        self.spent[name] += time.thread_time() - begun

    @property
    def total(self) -> float:
        return self.last - self.begun


class _Waits:
    """Counts what would wait for a GPU in every part but the log line."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    def begin_step(self) -> None:
        pass

    @contextlib.contextmanager
    def part(self, name: str) -> Any:
        if name in ("log line", "reading threads"):
            yield
            return
        with host_waits(torch.device("cpu")) as found:
            yield
        self.found.update(found)


def _train(
    data: Path, folder: Path, name: str, batch: int, accumulation: int, steps: int, every: int, watch: Any
) -> Any:
    import yaml

    from lvtrain.distributed import world as worlds
    from lvtrain.health.check import HealthCheck
    from lvtrain.health.probes import Gradients
    from lvtrain.health.served import Files
    from lvtrain.main import main

    recipe = yaml.safe_load((ROOT / "lvtrain" / "recipes" / "quickstart.yaml").read_text())
    recipe["name"] = type(watch).__name__.strip("_").lower()
    recipe["runs"] = str(folder / "runs")
    recipe["data"] |= {"path": str(data), "block": 8}
    recipe["backbone"]["name"] = name
    recipe["phases"] = [recipe["phases"][0] | {"global_batch": batch * accumulation, "micro_batches": accumulation}]
    recipe["phases"][0].pop("end")
    recipe["schedule"] = {"total": f"{steps} steps", "warmup": f"{steps // 2} steps"}
    recipe["evaluation"] = {"benchmarks": {}}
    recipe["checkpoint"] = {"every": "100000 steps"}
    recipe["logging"] = {"every": every, "trackers": []}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    parts = [
        (HealthCheck, "begin_step", "begin of a step"),
        (HealthCheck, "micro_batch", "micro-batch"),
        (HealthCheck, "_pull", "gradient of embeddings"),
        (HealthCheck, "end_micro_batch", "gradients"),
        (Gradients, "_see", "gradients"),
        (HealthCheck, "before_update", "movement"),
        (HealthCheck, "end_step", "movement"),
        (HealthCheck, "read", "log line"),
        (Files, "add", "reading threads"),
    ]
    with contextlib.ExitStack() as stack:
        for owner, method, part in parts:
            stack.enter_context(mock.patch.object(owner, method, _watched(getattr(owner, method), part, watch)))
        # DeepSpeed cannot open a second group in a process
        stack.enter_context(mock.patch.object(worlds, "stop", lambda: None))
        stack.enter_context(mock.patch.dict(os.environ, {"DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")}))
        log = io.StringIO()
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            code = main(["--recipe", str(folder / "recipe.yaml"), "--ds_config", str(ROOT / "ds_configs/zero2.json")])
    if code:
        raise RuntimeError(f"the training ended with {code}:\n{log.getvalue()[-2000:]}")
    return watch


def _watched(function: Callable[..., Any], part: str, watch: Any) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        if part == "begin of a step":
            watch.begin_step()
        with watch.part(part):
            return function(*arguments, **options)

    return call
