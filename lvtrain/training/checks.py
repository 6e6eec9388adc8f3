"""Everything that can be found wrong before any expensive work: one line each, on every rank alike."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from lvtrain.data import ShardDataset
from lvtrain.distributed import world as worlds
from lvtrain.engine.ds_config import resolve_ds_config
from lvtrain.errors import UserError
from lvtrain.evaluation import read_bin
from lvtrain.methods import create_method
from lvtrain.planning import plan_phases
from lvtrain.recipe.sections import Recipe
from lvtrain.recipe.trackers import TRACKERS
from lvtrain.training.initial import check_start_weights
from lvtrain.training.outcome import committed_step
from lvtrain.training.run_folder import changes
from lvtrain.training.schedule import learning_rate, phase_limit
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
        check_trackers(recipe)
    with torch.device("meta"):  # built without memory: a backbone or a method that cannot be is refused here
        method = create_method(recipe, num_classes=num_classes, device=torch.device("meta"))
    if files:
        method.check_files()
        if not begun:
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


def check_trackers(recipe: Recipe) -> None:
    """Whether the packages of the recipe's trackers are installed."""
    for section in recipe.logging.trackers:
        package = TRACKERS.get(section.name).package
        if importlib.util.find_spec(package) is None:
            raise UserError(f"logging.trackers: {section.name} needs the package {package}; pip install {package}")


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


def dry_run(
    recipe: Recipe,
    ds_config: Path,
    *,
    world_size: int | None,
    only_phase: str | None = None,
) -> str:
    """The plan as text, for `world_size` ranks (the launcher's number when absent).

    Raises:
        UserError: whatever a real start would refuse, as far as it can be seen without the ranks.
    """
    launched = worlds.launch()
    size = world_size or launched.size
    here = recipe.data.path.exists()
    resolve_ds_config(ds_config, optimizer=recipe.optimizer)
    classes, samples, where = sizes(recipe)
    config = check_before_start(recipe, ds_config, num_classes=classes, size=size, only_phase=only_phase, files=here)
    if here:
        check_benchmarks(recipe)
        changes(recipe.run_folder, recipe)
    rate = learning_rate(recipe.schedule, recipe.optimizer.lr, phases=recipe.phases, samples_per_epoch=samples)
    known = recipe.model_copy(update={"data": recipe.data.model_copy(update={"num_classes": classes})})
    plans = plan_phases(known, ranks=size, zero=config["zero_optimization"])

    lines = [
        f"recipe {recipe.name}: method {recipe.method.name}, {recipe.backbone.name}, {classes:,} classes, {samples:,} images ({where})",
        f"{size} rank{'s' if size > 1 else ''}, ZeRO-{config['zero_optimization']['stage']}, {recipe.optimizer.precision}; "
        f"{rate.total:,} samples in all ({rate.total / samples:.4g} epochs), warm-up {rate.warmup:,}",
        *(
            ["planned for 1 rank, since no launcher said how many: add --world-size N for N ranks"]
            if not world_size and launched.launcher == "python"
            else []
        ),
        *([f"warning: {rate.warning}"] if rate.warning else []),
        *(f"method.{name}: {path}{_absent(path)}" for name, path in recipe.method.sources().items()),
        "",
    ]
    start = 0
    for phase in recipe.phases:
        limit = phase_limit(phase, start, total=rate.total, samples_per_epoch=samples)
        steps = (limit - start) // phase.global_batch
        early = f", or earlier when mean cos^2 reaches {phase.end.cos2}" if phase.end.cos2 is not None else ""
        lines += [
            f"phase {phase.name}: up to {steps:,} steps ({(limit - start) / samples:.4g} epochs){early}",
            f"  global batch {phase.global_batch:,} = {phase.micro_batches} micro-batches of {phase.micro_batch}, "
            f"{phase.micro_batches // size} a rank a step; r = {phase.sample_rate:g}, expectation {phase.expectation}",
            "  " + plans[phase.name].table().replace("\n", "\n  "),
            "",
        ]
        start = limit
    return "\n".join(lines).rstrip()


def _absent(path: Path) -> str:
    return "" if path.exists() else ", which is not on this machine: the plan leaves it out"


def sizes(recipe: Recipe) -> tuple[int, int, str]:
    """Identities, images, and where the two are from: the data if they are here, else the recipe."""
    if recipe.data.path.exists():
        dataset = open_dataset(recipe)
        return dataset.num_classes, len(dataset), f"counted in {dataset.path}"
    if recipe.data.num_classes is None or recipe.data.num_samples is None:
        raise UserError(
            f"data.path: {recipe.data.path} does not exist here; to plan without it say how many identities and images it has: "
            "add data.num_classes=N data.num_samples=N"
        )
    return (
        recipe.data.num_classes,
        recipe.data.num_samples,
        f"as the recipe says: {recipe.data.path} is not on this machine, so verification sets and init_from were not looked for either",
    )
