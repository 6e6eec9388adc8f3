"""`--dry-run`: everything resolved and checked, and the plan of phases, parameters, memory a rank and bytes on the wire. Trains nothing.

Works without the data where the recipe or an override says `data.num_classes` and `data.num_samples`, so a run can be planned before it is downloaded.
"""

from __future__ import annotations

from pathlib import Path

from lvtrain.distributed import world as worlds
from lvtrain.engine.ds_config import resolve_ds_config
from lvtrain.errors import UserError
from lvtrain.methods.distill import Teacher
from lvtrain.planning import plan_phases
from lvtrain.recipe.sections import Recipe
from lvtrain.training.checks import check_before_start, check_benchmarks, open_dataset
from lvtrain.training.phases import plan_phase
from lvtrain.training.run_folder import changes
from lvtrain.training.schedule import learning_rate


def dry_run(
    recipe: Recipe,
    ds_config: Path,
    *,
    world_size: int | None,
    only_phase: str | None = None,
    teacher: Teacher | None = None,
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
    plans = plan_phases(known, ranks=size, zero=config["zero_optimization"], teacher=teacher.build if teacher else None)

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
        *([f"distilled from {teacher.name}"] if teacher else []),
        *(
            [f"warning: {recipe.distill.teacher} is not here: the plan is without the teacher"]
            if recipe.distill and not teacher
            else []
        ),
        "",
    ]
    start = 0
    for index, phase in enumerate(recipe.phases):
        plan = plan_phase(phase, index, start_step=0, start_samples=start, total=rate.total, samples_per_epoch=samples)
        steps = (plan.last_samples - start) // phase.global_batch
        early = f", or earlier when mean cos^2 reaches {phase.end.cos2}" if phase.end.cos2 is not None else ""
        lines += [
            f"phase {phase.name}: up to {steps:,} steps ({(plan.last_samples - start) / samples:.4g} epochs){early}",
            f"  global batch {phase.global_batch:,} = {phase.micro_batches} micro-batches of {phase.micro_batch}, "
            f"{phase.micro_batches // size} a rank a step; r = {phase.sample_rate:g}, expectation {phase.expectation}",
            "  " + plans[phase.name].table().replace("\n", "\n  "),
            "",
        ]
        start = plan.last_samples
    return "\n".join(lines).rstrip()


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
