"""The folder of a run: what every start writes there, and what may change between two starts."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import uuid
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from lvtrain.distributed import world as worlds
from lvtrain.distributed.world import World
from lvtrain.errors import UserError
from lvtrain.files import atomic
from lvtrain.files.patience import FORBIDDEN, in_words, patiently
from lvtrain.recipe import files as recipes
from lvtrain.recipe.resume import resume_reason, resume_rule
from lvtrain.recipe.sections import Recipe

_PACKAGES = (
    "torch",
    "deepspeed",
    "timm",
    "numpy",
    "nvidia-dali-cuda120",
    "webdataset",
    "accelerate",
    "safetensors",
    "pydantic",
)


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, opened for one start.

    Attributes:
        run_id: given at the run's first start.
        attempt: number of this start, from 1.
        changes: what the recipe changes since the last start that is allowed and reported.
    """

    path: Path
    run_id: str
    attempt: int
    changes: list[str]


def open_folder(recipe: Recipe, ds_config: dict[str, Any], world: World, *, licence: str) -> RunFolder:
    """Makes or reopens the run folder. A collective.

    Args:
        licence: of the data; kept here, because the data may be gone when the model card is written.

    Raises:
        UserError: the folder holds a run that has trained with another recipe, or cannot be written.
    """
    folder = recipe.run_folder
    return RunFolder(folder, *worlds.on_first(lambda: _open(folder, recipe, ds_config, world, licence)))


def _open(
    folder: Path, recipe: Recipe, ds_config: dict[str, Any], world: World, licence: str
) -> tuple[str, int, list[str]]:
    identity: dict[str, Any] = {"run_id": uuid.uuid4().hex, "attempt": 0}
    try:
        patiently(folder.mkdir, parents=True, exist_ok=True)
        reported = changes(folder, recipe)
        if patiently((folder / "run.json").exists):
            identity = json.loads(patiently((folder / "run.json").read_text))
        identity["attempt"] += 1
        atomic.write_text(folder / "recipe.yaml", recipes.dump(recipe))
        atomic.write_json(folder / "ds_config.json", ds_config, indent=2)
        atomic.write_json(folder / "environment.json", {**environment(world), "data_licence": licence}, indent=2)
        atomic.write_json(folder / "run.json", identity)
    except OSError as error:
        raise in_words(error, folder, "choose another run folder with runs=PATH", users=FORBIDDEN) from error
    return identity["run_id"], identity["attempt"], reported


def changes(folder: Path, recipe: Recipe) -> list[str]:
    """What another start with `recipe` changes of the run in `folder` that is allowed and reported.

    Raises:
        UserError: it changes something that is fixed for the run.
    """
    trained = (folder / "metrics.jsonl").exists() or any((folder / "checkpoints").glob("*"))
    if not (trained and (folder / "run.json").exists()):
        return []  # a start that was refused before its first step may be repeated with a corrected recipe
    before = _in_todays_keys(patiently((folder / "recipe.yaml").read_text))
    return compare(before, yaml.safe_load(recipes.dump(recipe)), str(folder))


def _in_todays_keys(text: str) -> dict[str, Any]:
    """The resolved recipe of an earlier start, with today's default for what did not exist then."""
    values = recipes.of_run(text)
    try:
        resolved: dict[str, Any] = yaml.safe_load(recipes.dump(recipes.resolve(values)))
    except UserError:  # a key that no longer exists: the comparison names it
        return values
    return resolved


def compare(before: dict[str, Any], now: dict[str, Any], folder: str) -> list[str]:
    """The differences of two resolved recipes that are allowed and reported.

    Raises:
        UserError: a key differs that is fixed for a run.
    """
    old, new = _flat(before), _flat(now)
    reported: list[str] = []
    refused: dict[str, str] = {}
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) == new.get(name) or resume_rule(name) == "free":
            continue
        text = f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
        if resume_rule(name) == "reported":
            reported.append(text)
        else:
            refused[text] = f"{name} is fixed, because {why}" if (why := resume_reason(name)) else ""
    if refused:
        first = list(refused)[:4]
        raise UserError(
            f"{folder} holds a run with another recipe ({'; '.join(first)}); "
            + "".join(f"{refused[text]}; " for text in first if refused[text])
            + f"use another name=..., and init_from.path={folder} to start from its weights"
        )
    return reported


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = [(str(i), element) for i, element in enumerate(value)]
    else:
        return {prefix.rstrip("."): value}
    return {name: leaf for key, below in items for name, leaf in _flat(below, f"{prefix}{key}.").items()}


def environment(world: World) -> dict[str, Any]:
    """Versions, hardware and launch of this start, for `environment.json`."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": sys.argv,
        "git": _git_commit(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "world_size": world.size,
        "device": str(world.device),
        "gpus": gpus,
        "cpus": os.cpu_count(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None
