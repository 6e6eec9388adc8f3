"""What the parts of the proof do. Each function runs in a process of its own and returns numbers for its JSON file.

Libraries are imported where they are used: a machine may lack some.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from tools.proof.child import apart

ROOT = Path(__file__).resolve().parent.parent.parent
_PACKAGES = (
    "torch",
    "triton",
    "deepspeed",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "timm",
    "accelerate",
    "numpy",
)


def environment(folder: Path) -> dict[str, Any]:
    """Versions, driver, and the GPU's name (null: torch sees none; `reason` says why)."""
    import importlib.metadata
    import platform

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    driver = Path("/proc/driver/nvidia/version")
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "driver": driver.read_text().split("\n")[0].split("Module")[-1].split()[0] if driver.exists() else None,
        "packages": {name: version(name) for name in _PACKAGES},
        "gpu": None,
        "cuda": None,
        "cpus": os.cpu_count(),
    }
    if not found["packages"]["torch"]:
        return found | {"reason": "torch is not installed"}
    import torch

    found["cuda"] = torch.version.cuda
    if torch.version.cuda is None:
        return found | {"reason": f"torch {torch.__version__} is built without CUDA"}
    try:
        properties = torch.cuda.get_device_properties(0)
    except Exception as error:
        return found | {"reason": str(error).strip().splitlines()[0]}
    return found | {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "capability": f"{properties.major}.{properties.minor}",
    }


def self_test(folder: Path) -> dict[str, Any]:
    """Whether the Triton kernels pass, what is wrong, and the seconds that the test took."""
    import torch

    from lvtrain.classifier.kernel import failure

    device = torch.device("cuda", 0)
    torch.zeros(1, device=device).add_(1).item()  # the device wakes up
    started = time.perf_counter()
    wrong = failure(device)
    return {"passes": wrong is None, "wrong": wrong, "seconds": round(time.perf_counter() - started, 2)}


def tests(folder: Path, files: list[str], arguments: list[str]) -> dict[str, Any]:
    """Numbers of tests that passed, failed and were skipped, and the names of those that failed.

    A file that cannot be imported, such as one that needs a package that is missing, is named in `note`.
    """
    import pytest

    class Counted:
        passed = skipped = collected = 0
        failed: list[str] = []  # noqa: RUF012 (one plugin a process)
        not_imported: list[str] = []  # noqa: RUF012

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                self.failed.append(report.nodeid)
            self.passed += report.passed and report.when == "call"
            self.skipped += report.skipped

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                reason = str(report.longrepr).strip().splitlines()[-1].removeprefix("E").strip()
                self.not_imported.append(f"{report.nodeid}: {reason}")

        def pytest_collection_finish(self, session: Any) -> None:
            self.collected = len(session.items)

    counted = Counted()
    os.chdir(ROOT)
    paths = [f"tests/{name}.py" for name in files]
    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", *arguments]
    pytest.main([*options, *paths], plugins=[counted])
    return {
        "collected": counted.collected,
        "passed": counted.passed,
        "skipped": counted.skipped,
        "failed": len(counted.failed) if counted.collected else None,
        "names": counted.failed,
        "note": "; ".join(counted.not_imported),
    }


def repeated(folder: Path, name: str, batch: int, classes: int, steps: int) -> dict[str, Any]:
    """Trains `steps` steps twice, and once with everything moved to new objects half way; compares all bits."""
    from tools.proof.repeat import digest

    once = digest(name, batch, classes, steps)
    return {
        "steps": steps,
        "digest": once,
        "same_twice": digest(name, batch, classes, steps) == once,
        "same_resumed": digest(name, batch, classes, steps, moved_at=steps // 2) == once,
    }


def trained(folder: Path, identities: int, images: int, steps: int, dali: bool = True) -> dict[str, Any]:
    """Trains PCO by the front door twice, and once stopped after the first phase and resumed; compares checkpoints."""
    from tools.trial import SMALL, contents

    data = apart(_faces, folder, out=folder, identities=identities, images=images)
    phases = [f"phases.{name}.end={{at_most: {steps // 4} steps}}" for name in ("alignment", "stabilisation")]
    recipe = [*SMALL, *phases, f"schedule.total={steps} steps", "schedule.warmup=2 steps", "deterministic=true"]
    recipe += ["checkpoint.every=100000 steps", "classifier.numerics=fast", "optimizer.precision=bfloat16"]
    starts: dict[str, list[list[str]]] = {"once": [[]], "again": [[]], "resumed": [["--phase", "alignment"], []]}
    for run, each in starts.items():
        for more in each:
            apart(_train, folder, data=data, runs=folder / "runs", recipe=[*recipe, f"name={run}", *more], dali=dali)
    once, again, resumed = (contents(folder / "runs" / run) for run in ("once", "again", "resumed"))

    def differing(other: dict[str, Any]) -> list[str]:
        return sorted(name for name in once.keys() | other.keys() if once.get(name) != other.get(name))

    found = {"again": differing(again), "resumed": differing(resumed)}
    return {
        "steps": steps,
        "compared": len(once),
        "differing": found,
        "same_twice": not found["again"],
        "same_resumed": not found["resumed"],
    }


def benchmark(folder: Path, subject: str, **options: Any) -> dict[str, Any]:
    """A subject of `tools/benchmark.py`."""
    import importlib

    found: dict[str, Any] = importlib.import_module(f"tools.benchmarks.{subject}").run(**options)
    return found


def step_rates(folder: Path, **options: Any) -> dict[str, Any]:
    """A whole step with all classes and with a tenth of them, and the ratio of their speeds."""
    every, tenth = (_step(folder, sample_rate=rate, **options) for rate in (1.0, 0.1))
    return {
        "all": every,
        "tenth": tenth,
        "all_by_tenth": round(every["images_per_second_a_rank"] / tenth["images_per_second_a_rank"], 4),
        "host_waits": sum(every["host_waits"].values()),
    }


def step_stages(folder: Path, **options: Any) -> dict[str, Any]:
    """A whole step under each ZeRO stage."""
    return {f"zero{stage}": _step(folder, stage=stage, **options) for stage in (1, 2, 3)}


def _step(folder: Path, **options: Any) -> dict[str, Any]:
    """DeepSpeed does not begin twice in one process."""
    found: dict[str, Any] = apart(benchmark, folder, folder=folder, subject="step", **options)
    return found


def data_wait(folder: Path, identities: int, images: int, dali: bool = True, **options: Any) -> dict[str, Any]:
    """A whole step that loads generated faces."""
    data = Path(apart(_faces, folder, out=folder, identities=identities, images=images)) / "train"
    _hide_dali(not dali)
    return benchmark(folder, "step", data=data, classes=identities, **options)


def data_path(
    folder: Path, images: int, batch: int, batches: int, backends: tuple[str, ...] = ("torch", "dali")
) -> dict[str, Any]:
    """Images/s of each backend to the GPU, and the mean difference of their pixels, of 255."""
    import torch

    from lvtrain.data import Loader, ShardDataset
    from tools.benchmarks.data import make_images

    make_images(folder / "images", images)
    first: dict[str, torch.Tensor] = {}
    rates: dict[str, float] = {}
    for backend in backends:
        dataset = ShardDataset(folder / "images")
        settings: dict[str, Any] = {"seed": 0, "micro_batch": batch, "micro_batches": 1, "block": 64}
        with Loader(dataset, backend=backend, device="cuda", threads=8, **settings) as loader:
            first[backend] = next(loader).images.float()
            started = time.perf_counter()
            for _ in range(batches):
                next(loader)
            torch.cuda.synchronize()
            rates[backend] = round(batches * batch / (time.perf_counter() - started), 1)
    found: dict[str, Any] = {"images_per_second": rates}
    if len(first) == 2:
        one, other = first.values()
        found["difference"] = float((one - other).abs().mean() * 127.5)
        found["dali_by_torch"] = round(rates["dali"] / rates["torch"], 3)
    return found


def pco(folder: Path, identities: int, images: int, steps: int, dali: bool = True) -> dict[str, Any]:
    """The quick start's recipe on this GPU; verification accuracy on unseen identities."""
    import json

    data = apart(_faces, folder, out=folder, identities=identities, images=images)
    recipe = [f"schedule.total={steps} steps", "checkpoint.every=100000 steps", "name=pco"]
    recipe += [f"evaluation.benchmarks={{heldout: {data}/heldout.bin}}", "logging={every: 10, trackers: []}"]
    if steps < 700:
        recipe += ["schedule.warmup=1 steps", *(f"phases.{i}.{key}" for i in range(3) for key in ("global_batch=16",))]
        recipe += [f"phases.{name}.end={{at_most: 2 steps}}" for name in ("alignment", "stabilisation")]
    started = time.perf_counter()
    apart(_train, folder, data=data, runs=folder / "runs", recipe=recipe, dali=dali)
    run = folder / "runs" / "pco"
    final = json.loads((run / "evaluation" / "final.json").read_text())["benchmarks"]["heldout"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "accuracy": final["accuracy"],
        "pairs": final["pairs"],
        "seconds": round(time.perf_counter() - started, 1),
        "last_row": rows[-1],
    }


def _faces(out: Path, identities: int, images: int) -> str:
    """Folder of generated faces, made once for parts that take the same."""
    from tools.synth_faces import main

    path = out / f"faces_{identities}_{images}"
    if not (path / "heldout.bin").exists():
        workers = min(16, os.cpu_count() or 1)
        heldout, pairs = (60, 3000) if identities > 100 else (12, 20)
        main(path, identities=identities, images=images, heldout=heldout, pairs=pairs, seed=0, workers=workers)
    return str(path)


def _train(data: str, runs: Path, recipe: list[str], dali: bool) -> None:
    """The quick start's recipe with changes, by the front door, on one GPU.

    Raises:
        RuntimeError: the training did not end well.
    """
    _hide_dali(not dali)
    from lvtrain.main import main

    os.chdir(ROOT)
    fixed = ["--recipe", "lvtrain/recipes/quickstart.yaml", "--ds_config", "ds_configs/zero1.json"]
    if code := main([*fixed, f"data.path={data}/train", f"runs={runs}", *recipe]):
        raise RuntimeError(f"the training ended with {code}")


def _hide_dali(hidden: bool) -> None:
    """Where DALI cannot be imported, the loader decodes with the torch path. A rehearsal's device has no runtime for it."""
    if hidden:
        sys.modules["nvidia.dali"] = None  # type: ignore[assignment]
