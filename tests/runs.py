"""Starts the real front door, `lvtrain.main.main`, on a small recipe, one process a rank; and the tools in this process.

The ranks are forked from a process that has imported the libraries once (`tools/trial.py`), because importing them costs more than the training.
Started by `deepspeed`, by `srun` and as a plain file it is in tests/test_main_errors.py, test_training_resume.py and test_launch_sandbox.py.
"""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
from pathlib import Path
from typing import Any

import typer
import yaml
from click.testing import Result
from typer.testing import CliRunner

from tests.conftest import ROOT
from tools.trial import start

# 240 images, global batch 16 = 4 micro-batches of 4: an epoch is 15 steps, the phases are entered by length
TINY: dict[str, Any] = {
    "name": "tiny",
    "seed": 5,
    "data": {"block": 8, "augmentation": "flip"},
    "backbone": {
        "name": "vit_nano",
        "embedding_dim": 32,
        "overrides": {"dim": 32, "depth": 2, "heads": 2, "drop_path": 0.1},
    },
    "method": {"name": "pco", "window": 2},
    "phases": [
        {
            "name": "alignment",
            "global_batch": 16,
            "micro_batches": 4,
            "sample_rate": 0.4,
            "end": {"at_most": "4 steps"},
        },
        {
            "name": "stabilisation",
            "global_batch": 16,
            "micro_batches": 4,
            "sample_rate": 0.4,
            "expectation": "update",
            "end": {"at_most": "4 steps"},
        },
        {"name": "refinement", "global_batch": 16, "micro_batches": 4, "expectation": "frozen"},
    ],
    "optimizer": {"lr": 1e-3, "precision": "float32"},
    "schedule": {"total": "12 steps", "warmup": "2 steps"},
    "checkpoint": {"every": "3 steps"},
    "logging": {"every": 1, "trackers": []},
}


def recipe_file(folder: Path, data: Path, /, **changes: Any) -> Path:
    """The tiny recipe with top-level sections replaced or merged (dicts merge one level deep), written to `folder/recipe.yaml`."""
    recipe = json.loads(json.dumps(TINY))
    recipe["runs"] = str(folder / "runs")
    recipe["data"]["path"] = str(data)
    for name, value in changes.items():
        # a method's section is replaced whole: another method has other keys
        merge = isinstance(value, dict) and isinstance(recipe.get(name), dict) and name != "method"
        recipe[name] = {**recipe[name], **value} if merge else value
    path = folder / "recipe.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(
    recipe: Path,
    *arguments: str,
    ranks: int = 1,
    zero: int = 2,
    environment: dict[str, str] | None = None,
    timeout: float = 800,  # a hang, not a slow machine
) -> int:
    """Runs to the end. Returns the exit code, which all ranks share. Their output goes to `log.txt` in the recipe's folder."""
    front_door = ["--recipe", str(recipe), "--ds_config", f"ds_configs/zero{zero}.json", *arguments]
    processes = start(ranks, front_door, recipe.parent / "log.txt", environment)
    for process in processes:
        process.join(timeout)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes[0] is not None and len(set(codes)) == 1, f"ranks ended differently: {codes}\n{output(recipe)}"
    return codes[0]


def tool(name: str, *arguments: object) -> Result:
    """`python tools/NAME.py ARGUMENTS` in this process: starting python costs more than most of what a tool does."""
    specification = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    if not (app := getattr(module, "app", None)):
        app = typer.Typer()
        app.command()(module.main)
    return CliRunner().invoke(app, list(map(str, arguments)))


def output(recipe: Path) -> str:
    return (recipe.parent / "log.txt").read_text()


def metrics(run_folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def events(run_folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_folder / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if kind is None or row["event"] == kind]
