"""What a recipe needs: days, GPU-hours and cost of the whole run, and memory per GPU; without GPU or data.

    python tools/plan.py lvtrain/recipes/pco_vitl_webface42m.yaml --ranks 64 --price-per-gpu-hour 2.5

The numbers of images and identities are counted in the data where it is on this machine; otherwise they are the
recipe's. Times are a roofline with stated efficiencies (lvtrain/planning/README.md), not measurements.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lvtrain.errors import one_line_errors


def main(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value changes to the recipe")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="GPUs of the run")] = 8,
    ds_config: Annotated[Path | None, typer.Option("--ds_config", help="DeepSpeed JSON; ZeRO-1 when absent")] = None,
    gpu: Annotated[str, typer.Option(help="a100-40, a100-80, h100, h200, b200, l40s or rtx4090")] = "h200",
    link: Annotated[
        str,
        typer.Option(help="network between nodes: ib-ndr400, ib-hdr200, roce-100, eth-25, ..., or measured GB/s a GPU"),
    ] = "ib-ndr400",
    node_link: Annotated[
        str | None,
        typer.Option(
            "--node-link", help="link inside a node: nvlink3 to 5, pcie3 to 5; default: the usual one of the GPU"
        ),
    ] = None,
    per_node: Annotated[int, typer.Option("--per-node", min=1, help="GPUs of a node")] = 8,
    price: Annotated[
        float | None,
        typer.Option("--price-per-gpu-hour", min=0, help="also prints the cost of the run, in your currency"),
    ] = None,
    detail: Annotated[
        bool, typer.Option("--detail", help="memory, time and communication of a step, part by part")
    ] = False,
    suggested: Annotated[
        bool, typer.Option("--suggest", help="find the cheapest setting that fits the GPU's memory")
    ] = False,
    scaled: Annotated[
        bool, typer.Option("--scale-table", help="what breaks first on 8 to 512 GPUs, as a Markdown table")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
    matmul: Annotated[
        float | None, typer.Option(help="measured bfloat16 matmul rate, Tflop/s (tools/benchmark.py)")
    ] = None,
    memory: Annotated[float | None, typer.Option(help="memory of the GPU, GB, instead of the data sheet's")] = None,
) -> None:
    # imported here, because they import torch: --help answers at once
    from lvtrain.engine.ds_config import resolve_ds_config
    from lvtrain.methods import MethodSection
    from lvtrain.planning import ROOM, RunPlan, device, plan_phases, planned_micro_batches, scale_table, suggest
    from lvtrain.recipe import files as recipes
    from lvtrain.training.checks import sizes
    from lvtrain.training.earlier_starts import with_recorded_micro_batches
    from lvtrain.training.schedule import phase_images

    with one_line_errors("plan", recipe):
        chosen = device(gpu, link=link, node_link=node_link, per_node=per_node)
        if matmul is not None:
            chosen = replace(chosen, matmul=matmul * 1e12)
        if memory is not None:
            chosen = replace(chosen, memory=memory * 1e9)
        loaded = recipes.load(recipe, overrides or [])
        if scaled:
            typer.echo(scale_table(loaded, device=chosen))
            return
        zero: dict[str, Any] = {"stage": 1}
        if ds_config:
            resolved = resolve_ds_config(ds_config, optimizer=loaded.optimizer, phases=loaded.phases, world_size=ranks)
            zero = resolved["zero_optimization"]
        assert isinstance(loaded.method, MethodSection)
        for key, path in loaded.method.sources().items():
            if not path.exists():
                typer.echo(f"plan: warning: method.{key}: {path} is not here: the plan leaves it out", err=True)
        classes, samples, _ = sizes(loaded)
        images = phase_images(loaded, samples_per_epoch=samples)
        if suggested:
            cheapest = suggest(loaded, images, ranks=ranks, num_classes=classes, device=chosen)
            plans = dict(cheapest.phases)
        else:
            loaded = with_recorded_micro_batches(loaded)
            counts = planned_micro_batches(loaded, memory=chosen.memory, ranks=ranks, zero=zero, num_classes=classes)
            plans = plan_phases(
                loaded.with_micro_batches(counts), ranks=ranks, zero=zero, num_classes=classes, device=chosen
            )
        planned = RunPlan(plans, images, samples, price)
    paste = {"ds_config": cheapest.ds_config, "overrides": cheapest.overrides} if suggested else {}
    if as_json:
        typer.echo(json.dumps(planned.as_dict() | ({"suggested setting": paste} if paste else {}), indent=1))
        return
    where = "counted in the data" if loaded.data.path.exists() else "from the recipe"
    network = f"{loaded.backbone.name} ({planned.parameters / 1e6:.1f} M parameters)"
    typer.echo(f"{network}, {classes:,} identities, {samples:,} images ({where})"[:100])
    typer.echo(planned.screen())
    if suggested:
        typer.echo(
            f"the cheapest of {cheapest.tried} settings that takes at most {ROOM:.0%} of the memory; for a new run:"
        )
        if cheapest.stage == 3:
            typer.echo("ZeRO-3 makes the host wait, which is not planned: where ZeRO-1 fits, too, measure both")
        typer.echo(f"DeepSpeed JSON: {json.dumps(cheapest.ds_config)}")
        typer.echo("overrides:\n" + " \\\n".join(cheapest.overrides))
    elif not planned.fits:
        typer.echo("--suggest finds a setting that fits")
    if detail:
        for phase, found in plans.items():
            typer.echo(f"\nphase {phase}: {found.table()}")


if __name__ == "__main__":
    typer.run(main)
