"""The folder of a run: what every start writes there."""

from __future__ import annotations

import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvtrain.checkpoint.lease import ELSEWHERE, Fence
from lvtrain.checkpoint.reader import newest_summary
from lvtrain.data import ShardDataset
from lvtrain.distributed import world as worlds
from lvtrain.distributed.environment import environment
from lvtrain.distributed.world import World
from lvtrain.files import atomic
from lvtrain.files.patience import FORBIDDEN, in_words, patiently
from lvtrain.files.reading import parse_json
from lvtrain.methods.provenance import collect
from lvtrain.recipe import files as recipes
from lvtrain.recipe.sections import Recipe
from lvtrain.training.earlier_starts import ENVIRONMENT, IDENTITY, RECIPE, changes, flat, has_trained
from lvtrain.weights.provenance import FILE as PROVENANCE

# keys of environment.json that change numbers, and how
_COMPILED = "compiled"
_REPORTED = {"classifier_kernel": "rounding differs", _COMPILED: "rounding and draws of stochastic depth differ"} | {
    f"packages.{package}": follows
    for package, follows in (
        ("torch", "rounding may differ"),
        ("triton", "rounding may differ"),
        ("nvidia-dali-cuda120", "pixels may differ"),
        ("nvidia-dali-cuda130", "pixels may differ"),
    )
}


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, opened for one start.

    Attributes:
        run_id: given at the run's first start.
        attempt: number of this start, from 1.
        changes: keys of the recipe that differ from the last start's; allowed, and reported.
        surroundings: other changes since then that the numbers depend on, and their consequence.
    """

    path: Path
    run_id: str
    attempt: int
    changes: list[str]
    surroundings: list[str]


def open_folder(
    recipe: Recipe,
    ds_config: dict[str, Any],
    world: World,
    *,
    fingerprint: str,
    facts: dict[str, Any],
    fence: Fence | None = None,
) -> RunFolder:
    """Makes or reopens the run folder. A collective.

    Args:
        recipe: the recipe; it names the folder.
        ds_config: the resolved DeepSpeed configuration.
        world: this process among the ranks.
        fingerprint: of the dataset.
        facts: added to `environment.json`: the classifier's kernel and the licence of the data, because the data may
            be gone when the model card is written.
        fence: of the folder; asked before anything is written.

    Raises:
        UserError: the folder holds a run that has trained with another recipe or dataset, or cannot be written.
    """
    opened = worlds.on_first(lambda: _open(recipe, ds_config, world, fingerprint, facts, fence))
    return RunFolder(recipe.run_folder, *opened)


def _open(
    recipe: Recipe,
    ds_config: dict[str, Any],
    world: World,
    fingerprint: str,
    facts: dict[str, Any],
    fence: Fence | None,
) -> tuple[str, int, list[str], list[str]]:
    folder = recipe.run_folder
    try:
        patiently(folder.mkdir, parents=True, exist_ok=True)
        reported = changes(folder, recipe, fingerprint)
        identity = _identity(folder)
        identity["attempt"] += 1
        now = environment(world) | facts
        surroundings = _surroundings(folder, now) if identity["attempt"] > 1 else []
        if fence is not None:
            fence.check()
        atomic.write_text(folder / RECIPE, recipes.dump(recipe))
        atomic.write_json(folder / "ds_config.json", ds_config, indent=2)
        atomic.write_json(folder / ENVIRONMENT, now, indent=2)
        atomic.write_json(folder / IDENTITY, identity)
    except OSError as error:
        raise in_words(error, folder, ELSEWHERE, users=FORBIDDEN) from error
    return identity["run_id"], identity["attempt"], reported, surroundings


def _surroundings(folder: Path, now: dict[str, Any]) -> list[str]:
    """Entries of `_REPORTED` that differ from the last start's `environment.json`; none if that file was lost."""
    try:
        before = parse_json(patiently((folder / ENVIRONMENT).read_text))
    except (FileNotFoundError, ValueError):
        return []
    old, new = flat(before), flat(now)
    return [
        f"{name}: {old.get(name)} -> {new.get(name)}; {follows}"
        for name, follows in _REPORTED.items()
        # version 0.1.0 compiled whole networks, and wrote nothing about it
        if (name in old or name == _COMPILED) and old.get(name) != new.get(name)
    ]


def keep_provenance(folder: Path, recipe: Recipe, dataset: ShardDataset, fence: Fence | None = None) -> None:
    """Writes `provenance.json` into an opened run folder. A collective.

    A run that has trained keeps what its first start wrote, because the weights that it began from may be gone.

    Raises:
        UserError: the folder cannot be written.
    """
    worlds.on_first(lambda: _keep(folder, recipe, dataset, fence))


def _keep(folder: Path, recipe: Recipe, dataset: ShardDataset, fence: Fence | None) -> None:
    try:
        if has_trained(folder) and patiently((folder / PROVENANCE).exists):
            return
        environment = parse_json(patiently((folder / "environment.json").read_text))
        found = collect(recipe, dataset, environment).as_json()
        if fence is not None:
            fence.check()
        atomic.write_json(folder / PROVENANCE, found, indent=2)
    except OSError as error:
        raise in_words(error, folder, ELSEWHERE, users=FORBIDDEN) from error


def _identity(folder: Path) -> dict[str, Any]:
    """Run id and number of starts so far, from `run.json`.

    If that was lost, the id is the newest checkpoint's, and starts are counted from 0. A new run gets a new id.
    """
    path = folder / IDENTITY
    try:
        found = parse_json(patiently(path.read_text))
        return {"run_id": str(found["run_id"]), "attempt": int(found["attempt"])}
    except FileNotFoundError:
        lost = "is missing" if patiently((folder / RECIPE).exists) else None
    except (ValueError, KeyError, TypeError):
        lost = "cannot be read"
    newest = newest_summary(folder) if lost else None
    if newest is None:
        return {"run_id": uuid.uuid4().hex, "attempt": 0}
    print(f"warning: {path} {lost}; made again from {newest.path}", file=sys.stderr, flush=True)
    return {"run_id": newest.run_id, "attempt": 0}
