"""What a run keeps from its earlier starts: the recipe, the micro-batches and the sampling rule; and what may change."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from lvtrain.checkpoint.folder import refuse_another_dataset
from lvtrain.checkpoint.reader import newest_summary
from lvtrain.classifier import sampling
from lvtrain.distributed import world as worlds
from lvtrain.distributed.world import World
from lvtrain.errors import UserError
from lvtrain.files.patience import patiently
from lvtrain.planning import planned_micro_batches
from lvtrain.recipe import files as recipes
from lvtrain.recipe.resume import resume_reason, resume_rule
from lvtrain.recipe.sections import Recipe

RECIPE, IDENTITY, ENVIRONMENT = "recipe.yaml", "run.json", "environment.json"


def has_trained(folder: Path) -> bool:
    """Whether the run in `folder` has left figures or checkpoints."""
    checkpoints = folder / "checkpoints"
    return patiently((folder / "metrics.jsonl").exists) or (
        patiently(checkpoints.is_dir) and bool(patiently(os.listdir, checkpoints))
    )


def with_recorded_micro_batches(recipe: Recipe) -> Recipe:
    """The recipe with the micro-batches of the run in its folder, where the recipe leaves them open.

    So what the first start decided stays, on any GPU and in any version.

    Raises:
        UserError: the run has trained and its recipe is lost.
    """
    if not recipe.open_phases or not _has_begun(recipe.run_folder):
        return recipe
    before = {phase.get("name"): phase for phase in _recipe_before(recipe.run_folder).get("phases", [])}
    counts = {}
    for phase in recipe.open_phases:
        recorded = before.get(phase.name, {})
        # another global batch is refused later, when the recipes are compared
        if recorded.get("global_batch") == phase.global_batch and "micro_batches" in recorded:
            counts[phase.name] = recorded["micro_batches"]
    return recipe.with_micro_batches(counts)


def decide_micro_batches(recipe: Recipe, ds_config: dict[str, Any], *, num_classes: int, world: World) -> Recipe:
    """The recipe with the micro-batches of every phase: as recorded, else planned for the smallest GPU of this start.

    On a CPU they are the recipe's default. Rank 0 decides. A collective.

    Raises:
        UserError: the run has trained and its recipe is lost.
    """
    if not recipe.open_phases:
        return recipe
    memory = None
    if world.device.type == "cuda":
        memory = min(worlds.gather_objects(torch.cuda.get_device_properties(world.device).total_memory))

    def decide() -> dict[str, int]:
        decided = with_recorded_micro_batches(recipe)
        if memory is not None and not _has_begun(recipe.run_folder):
            zero = ds_config["zero_optimization"]
            planned = planned_micro_batches(recipe, memory=memory, ranks=world.size, zero=zero, num_classes=num_classes)
            decided = decided.with_micro_batches(planned)
            for before, phase in zip(recipe.phases, decided.phases, strict=True):
                if before.micro_batches != phase.micro_batches:
                    print(
                        f"lvtrain: phases.{phase.name}.micro_batches={phase.micro_batches} for this run: "
                        f"{before.micro_batch} images each do not fit {memory / 1e9:.0f} GB by the plan",
                        flush=True,
                    )
        return {phase.name: phase.micro_batches for phase in decided.phases}

    return recipe.with_micro_batches(worlds.on_first(decide))


def _has_begun(folder: Path) -> bool:
    """Whether the run has trained under a recipe that is known."""
    return has_trained(folder) and (patiently((folder / RECIPE).exists) or patiently((folder / IDENTITY).exists))


def changes(folder: Path, recipe: Recipe, fingerprint: str) -> list[str]:
    """The changes that another start of the run in `folder` with `recipe` makes; allowed, and reported.

    It writes nothing: a start that is refused leaves the folder as it was.

    Args:
        folder: of the run.
        recipe: of this start.
        fingerprint: of its dataset.

    Raises:
        UserError: a key differs that is fixed for the run; or the run has trained on another dataset; or its recipe is
            lost; or classes were sampled by another rule.
    """
    if not _has_begun(folder):
        return []  # a start that was refused before its first step left no results, so the recipe may be corrected
    newest = newest_summary(folder)
    if newest is not None:
        refuse_another_dataset(newest.path, newest.fingerprint, fingerprint)
        _refuse_another_sampling(folder, recipe, newest.meta)
    return compare(_recipe_before(folder), yaml.safe_load(recipes.dump(recipe)), str(folder))


def _refuse_another_sampling(folder: Path, recipe: Recipe, meta: dict[str, Any]) -> None:
    """Refuses a run of another sampling rule, unless all classes take part in everything that it has still to train."""
    rule = meta.get("class_sampling", 1)
    if rule == sampling.RULE:
        return
    position = meta["position"]
    left = recipe.phases[position["phase_index"] + position["phase_over"] :]
    sampled = [phase.name for phase in left if phase.sample_rate < 1]
    if sampled:
        raise UserError(
            f"{folder} was begun by a version that samples classes by another rule (rule {rule}, today's is "
            f"{sampling.RULE}), and phase {sampled[0]} has a sample_rate below 1; finish it with that version "
            f"({ENVIRONMENT} has its commit), or use another name=..., and init_from.path={folder} to start from its weights"
        )


def _recipe_before(folder: Path) -> dict[str, Any]:
    """The recipe of the last start, from `recipe.yaml`; if that was lost, from the newest checkpoint."""
    path = folder / RECIPE
    try:
        text = patiently(path.read_text)
        if isinstance(yaml.safe_load(text), dict):
            return _in_todays_keys(text)
        lost = "is empty"
    except FileNotFoundError:
        lost = "is missing"
    except (ValueError, yaml.YAMLError):
        lost = "cannot be read"
    newest = newest_summary(folder)
    if newest is None or "recipe" not in newest.meta:
        raise UserError(f"{path} {lost}, and no checkpoint holds the recipe; put the recipe of this run there")
    print(f"warning: {path} {lost}; made again from {newest.path}", file=sys.stderr, flush=True)
    return _in_todays_keys(yaml.safe_dump(newest.meta["recipe"]))


def _in_todays_keys(text: str) -> dict[str, Any]:
    """The resolved recipe of an earlier start; keys that did not exist then have today's default."""
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
    old, new = flat(before), flat(now)
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


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every value of nested objects and lists, by its dotted name."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = [(str(i), element) for i, element in enumerate(value)]
    else:
        return {prefix.rstrip("."): value}
    return {name: leaf for key, below in items for name, leaf in flat(below, f"{prefix}{key}.").items()}
