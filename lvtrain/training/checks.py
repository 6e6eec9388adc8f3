"""Everything that can be found wrong before any expensive work, and the plan that `--dry-run` prints.

Each problem is one UserError of one line, the same on every rank.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any, cast

import torch

from lvtrain.data import ShardDataset
from lvtrain.data.cache import cached
from lvtrain.data.shard_files import Originals
from lvtrain.distributed import world as worlds
from lvtrain.engine.ds_config import check_with_deepspeed, resolve_ds_config
from lvtrain.errors import UserError
from lvtrain.evaluation import suite
from lvtrain.evaluation.protocol import PROTOCOLS
from lvtrain.methods import MethodSection, create_method, method_title
from lvtrain.planning import H200, RunPlan, plan_phases, planned_micro_batches
from lvtrain.recipe.sections import Phase, Recipe
from lvtrain.recipe.trackers import TRACKERS
from lvtrain.training.earlier_starts import changes
from lvtrain.training.initial import check_start_weights, open_initial
from lvtrain.training.outcome import committed_step
from lvtrain.training.schedule import learning_rate, phase_images, rate_line


def open_dataset(recipe: Recipe) -> ShardDataset:
    """Opens the recipe's dataset and checks manifest, index, the size of every shard, and that labels are in range.

    Raises:
        UserError: a shard that is missing or cut, no images, a label that is not below the number of classes, or
            another number of identities or images than the recipe expects.
    """
    data = recipe.data
    files = cached(data.cache, data.cache_bytes) if data.cache else Originals
    dataset = ShardDataset(data.path, files=files)
    dataset.check_labels()
    for key, expected, found, unit in (
        ("num_classes", data.num_classes, dataset.num_classes, "identities"),
        ("num_samples", data.num_samples, len(dataset), "images"),
    ):
        if expected not in (None, found):
            raise UserError(
                f"data.{key}={expected}, but {dataset.path} has {found} {unit}; set data.{key} to {found} or null"
            )
    return dataset


def check_before_start(
    recipe: Recipe,
    ds_config: Path,
    *,
    sizes: tuple[int, int],
    ranks: int,
    only_phase: str | None = None,
    files: bool = True,
) -> dict[str, Any]:
    """Checks recipe, DeepSpeed JSON, dataset and number of ranks against each other. A start and a dry run both call it.

    Args:
        recipe: the recipe.
        ds_config: file of the DeepSpeed JSON.
        sizes: number of identities and of images of the dataset.
        ranks: number of ranks of the start.
        only_phase: name of the phase to train; None for all.
        files: whether files besides the dataset must be here; False to plan for another machine.

    Returns:
        The resolved DeepSpeed configuration.

    Raises:
        UserError: they do not agree; the line says what to change.
    """
    num_classes, num_samples = sizes
    check_ranks(recipe, num_classes=num_classes, ranks=ranks)
    learning_rate(recipe.schedule, recipe.optimizer, phases=recipe.phases, samples_per_epoch=num_samples)
    names = [phase.name for phase in recipe.phases]
    if only_phase is not None and only_phase not in names:
        raise UserError(f"--phase {only_phase}: the recipe has {', '.join(names)}")
    is_new = committed_step(recipe.run_folder) == 0  # a resumed run does not read the weights it began from
    if files:
        _check_files(recipe, is_new=is_new)
        check_trackers(recipe)
        _check_compiler(recipe)
    with torch.device("meta"):  # takes no memory; raises what the backbone or the method refuses
        method = create_method(recipe, num_classes=num_classes, device=torch.device("meta"))
    if files:
        method.check_files()
        if is_new:
            check_start_weights(recipe, method)
    config = resolve_ds_config(ds_config, optimizer=recipe.optimizer, phases=recipe.phases, world_size=ranks)
    check_with_deepspeed(config, str(ds_config))
    if recipe.backbone.compile and config["zero_optimization"]["stage"] == 3:
        raise UserError(
            "backbone.compile does not work with ZeRO-3, whose hooks torch.compile does not see; "
            "use ds_configs/zero1.json or zero2.json, or set backbone.compile=false"
        )
    return config


def _check_compiler(recipe: Recipe) -> None:
    """Triton builds its launchers with a C compiler, at the first step: a node without one is found here."""
    names = (os.environ.get("CC", ""), "gcc", "clang", "cc")
    if recipe.backbone.compile and torch.cuda.is_available() and not any(map(shutil.which, filter(None, names))):
        raise UserError(
            "backbone.compile needs a C compiler (gcc, clang, or CC=...) on this node, and there is none; "
            "install one, or set backbone.compile=false"
        )


def _check_files(recipe: Recipe, *, is_new: bool) -> None:
    suite.recipe_tasks(recipe.evaluation.benchmarks)
    if is_new and recipe.init_from is not None:
        if not recipe.init_from.path.exists():
            raise UserError(f"init_from.path: {recipe.init_from.path} does not exist")
        open_initial(recipe.init_from)


def check_benchmarks(recipe: Recipe) -> None:
    """Opens every benchmark's files once. One rank calls it, before there is a run folder.

    Raises:
        UserError: a benchmark that is damaged or incomplete.
    """
    for task in suite.recipe_tasks(recipe.evaluation.benchmarks):
        try:
            PROTOCOLS.get(task.kind)(task.options).check(task.paths)
        except UserError as error:
            raise UserError(f"evaluation.benchmarks.{task.name}: {error}") from error


def check_trackers(recipe: Recipe) -> None:
    """Refuses trackers whose package is missing.

    Raises:
        UserError: a tracker whose package is not installed.
    """
    for section in recipe.logging.trackers:
        package = TRACKERS.get(section.name).package
        if importlib.util.find_spec(package) is None:
            raise UserError(f"logging.trackers: {section.name} needs the package {package}; pip install {package}")


def check_ranks(recipe: Recipe, *, num_classes: int, ranks: int) -> None:
    """Refuses a number of ranks over which the recipe cannot be split.

    Raises:
        UserError: the ranks cannot share the micro-batches evenly, or there are more ranks than classes.
    """
    for phase in recipe.phases:
        count = phase.micro_batches
        if count % ranks:
            allowed = ", ".join(str(r) for r in range(1, count + 1) if count % r == 0)
            raise UserError(
                f"{ranks} ranks do not divide phases.{phase.name}.micro_batches={count}; "
                f"start {allowed} ranks, or change micro_batches (a new run)"
            )
    if ranks > num_classes:
        raise UserError(
            f"{ranks} ranks but only {num_classes} classes: every rank needs at least one; "
            f"start at most {num_classes} ranks"
        )


def dry_run(recipe: Recipe, ds_config: Path, *, ranks: int | None, only_phase: str | None = None) -> str:
    """Checks what a start would check, and returns the plan as text: phases, parameters, memory, bytes sent.

    It works without the data where the recipe has `data.num_classes` and `data.num_samples`.

    Args:
        recipe: the recipe.
        ds_config: file of the DeepSpeed JSON.
        ranks: to plan for; None for the launcher's number.
        only_phase: name of the phase to train; None for all.

    Raises:
        UserError: anything that a start would refuse and one process can find.
    """
    launched = worlds.launch()
    size = ranks or launched.size
    here = recipe.data.path.exists()
    classes, samples, where = sizes(recipe)
    config = check_before_start(
        recipe, ds_config, sizes=(classes, samples), ranks=size, only_phase=only_phase, files=here
    )
    if here:
        check_benchmarks(recipe)
        changes(recipe.run_folder, recipe, open_dataset(recipe).fingerprint)
    rate = learning_rate(recipe.schedule, recipe.optimizer, phases=recipe.phases, samples_per_epoch=samples)
    zero = config["zero_optimization"]
    recipe = recipe.with_micro_batches(
        planned_micro_batches(recipe, memory=H200.memory, ranks=size, zero=zero, num_classes=classes)
    )
    images = phase_images(recipe, samples_per_epoch=samples)
    planned = RunPlan(plan_phases(recipe, ranks=size, zero=zero, num_classes=classes), images, samples)

    lines = [
        f"recipe {recipe.name}: method {method_title(recipe.method.name)}, {recipe.backbone.name} "
        f"({planned.parameters / 1e6:.1f} M parameters), {classes:,} identities, {samples:,} images ({where})",
        f"{rate.total:,} images in all ({rate.total / samples:.4g} epochs), warm-up {rate.warmup:,}",
    ]
    if not ranks and launched.launcher == "python":
        lines.append("planned for 1 rank; add --ranks N for N ranks")
    lines.append(rate_line(recipe.optimizer, recipe.phases))
    for key, path in cast(MethodSection, recipe.method).sources().items():
        absent = "" if path.exists() else ", which is not here, so the plan leaves it out"
        lines.append(f"method.{key}: {path}{absent}")
    for phase in recipe.phases:
        steps, epochs = images[phase.name] // phase.global_batch, images[phase.name] / samples
        early = f", or earlier when mean cos^2 reaches {phase.end.cos2}" if phase.end.cos2 is not None else ""
        lines += [
            f"phase {phase.name}: up to {steps:,} steps ({epochs:.4g} epochs){early}",
            f"  global batch {phase.global_batch:,} = {phase.micro_batches} micro-batches of {phase.micro_batch}, "
            f"{phase.micro_batches // size} per rank per step; r = {phase.sample_rate:g}"
            + "".join(f", {key} {value}" for key, value in phase.model_dump(exclude=set(Phase.model_fields)).items()),
        ]
    lines += ["", planned.screen(), "other GPUs, cost, and every part: python tools/plan.py --help"]
    return "\n".join(lines)


def sizes(recipe: Recipe) -> tuple[int, int, str]:
    """Identities, images, and the source of both numbers: the data if it is on this machine, otherwise the recipe."""
    if recipe.data.path.exists():
        dataset = open_dataset(recipe)
        return dataset.num_classes, len(dataset), f"counted in {dataset.path}"
    classes, samples = recipe.data.num_classes, recipe.data.num_samples
    if classes is None or samples is None:
        raise UserError(
            f"data.path: {recipe.data.path} does not exist here; to plan without the data, "
            "add data.num_classes=N data.num_samples=N"
        )
    return classes, samples, f"from the recipe; {recipe.data.path} is not here, so no other files were looked for"
