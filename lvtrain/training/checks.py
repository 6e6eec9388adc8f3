"""Everything that can be found wrong before any expensive work: one line each, on every rank alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lvtrain.data import ShardDataset
from lvtrain.engine.ds_config import resolve_ds_config
from lvtrain.errors import UserError
from lvtrain.evaluation import read_bin
from lvtrain.methods import create_method
from lvtrain.recipe.sections import Recipe
from lvtrain.training.initial import check_start_weights
from lvtrain.training.outcome import committed_step
from lvtrain.weights.runs import weights_file


def open_dataset(recipe: Recipe) -> ShardDataset:
    """The recipe's dataset, structurally checked: manifest, index, every shard present and of its recorded size, every label in range.

    Raises:
        UserError: missing or cut shard, no images, a label not below the number of classes, not the number of identities or images the recipe expects.
    """
    dataset = ShardDataset(recipe.data.path, cache=recipe.data.cache, cache_bytes=recipe.data.cache_bytes)
    dataset.check_labels()
    told = recipe.data.num_classes
    if told is not None and told < dataset.num_classes:
        raise UserError(
            f"data.num_classes={told} but {dataset.path} has labels up to {dataset.num_classes - 1}; "
            f"set data.num_classes to {dataset.num_classes} or to null"
        )
    if told is not None and told > dataset.num_classes:
        raise UserError(
            f"data.num_classes={told} but {dataset.path} has {dataset.num_classes} identities: the other {told - dataset.num_classes} class centres "
            f"would never see an image; set data.num_classes to {dataset.num_classes} or to null"
        )
    if recipe.data.num_samples not in (None, len(dataset)):
        raise UserError(
            f"data.num_samples={recipe.data.num_samples} but {dataset.path} holds {len(dataset)} images; "
            "set data.num_samples to that or to null, or mend data.path"
        )
    return dataset


def check_before_start(
    recipe: Recipe, ds_config: Path, *, num_classes: int, size: int, only_phase: str | None = None, files: bool = True
) -> dict[str, Any]:
    """Checks recipe, DeepSpeed JSON, dataset and number of ranks against each other; returns the resolved DeepSpeed configuration.

    `files=False` plans for another machine: what the recipe names besides the dataset is not looked for here.

    Raises:
        UserError: they do not fit; the line says what to change.
    """
    check_ranks(recipe, num_classes=num_classes, size=size)
    names = [phase.name for phase in recipe.phases]
    if only_phase is not None and only_phase not in names:
        raise UserError(f"--phase {only_phase}: the recipe has {', '.join(names)}")
    begun = committed_step(recipe.run_folder) > 0  # a run that goes on has no use any more for what it was begun from
    if files:
        _check_files(recipe, begun=begun)
    with torch.device("meta"):  # built without memory: a backbone or a method that cannot be is refused here
        method = create_method(recipe, num_classes=num_classes, device=torch.device("meta"))
    if files and not begun:
        check_start_weights(recipe, method)
    in_backward = recipe.classifier is not None and recipe.classifier.optimizer.in_backward
    for phase in recipe.phases:
        if in_backward and (phase.micro_batches != size or phase.sample_rate < 1):
            raise UserError(
                f"classifier.optimizer.in_backward updates rows inside backward, so phase {phase.name} needs one micro-batch a rank "
                f"(micro_batches={size}) and sample_rate=1; set in_backward=false"
            )
    config = resolve_ds_config(ds_config, optimizer=recipe.optimizer, phases=recipe.phases, world_size=size)
    if recipe.backbone.compile and config["zero_optimization"]["stage"] == 3:
        raise UserError(
            "backbone.compile: torch.compile does not see the hooks by which ZeRO-3 fetches weights; use ds_configs/zero1.json or zero2.json, "
            "or set backbone.compile=false"
        )
    return config


def _check_files(recipe: Recipe, *, begun: bool) -> None:
    for name, path in recipe.evaluation.benchmarks.items():
        if not path.is_file():
            wrong = "is a folder; give a .bin verification set" if path.exists() else "does not exist"
            raise UserError(f"evaluation.benchmarks.{name}: {path} {wrong}")
    if begun:
        return
    if recipe.init_from is not None:
        if not recipe.init_from.path.exists():
            raise UserError(f"init_from.path: {recipe.init_from.path} does not exist")
        weights_file(recipe.init_from.path)
    landmark_weights = getattr(recipe.method, "landmark_weights", None)
    if landmark_weights is not None and not landmark_weights.exists():
        raise UserError(
            f"method.landmark_weights: {landmark_weights} does not exist; train a supervised Part fViT first"
        )


def check_benchmarks(recipe: Recipe) -> None:
    """Reads every verification set once: for one rank, before there is a run folder.

    Raises:
        UserError: a set that is damaged or incomplete.
    """
    for name, path in recipe.evaluation.benchmarks.items():
        try:
            read_bin(path)
        except UserError as error:
            raise UserError(f"evaluation.benchmarks.{name}: {error}") from error


def check_ranks(recipe: Recipe, *, num_classes: int, size: int) -> None:
    for phase in recipe.phases:
        v = phase.micro_batches
        if v % size:
            allowed = ", ".join(str(r) for r in range(1, v + 1) if v % r == 0)
            raise UserError(
                f"{size} ranks do not divide phases.{phase.name}.micro_batches={v}; start {allowed} ranks, or change micro_batches (a new run)"
            )
    if size > num_classes:
        raise UserError(
            f"{size} ranks but only {num_classes} classes: every rank needs at least one; start at most {num_classes} ranks"
        )
