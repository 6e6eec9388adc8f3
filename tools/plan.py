"""What a recipe needs on so many GPUs: memory a rank, time a step, bytes on the wire, hours an epoch. No GPU; the data's own figures where they
are here, else the recipe's.

    python tools/plan.py lvtrain/recipes/pco_vitl_webface42m.yaml --ranks 64 --ds_config ds_configs/zero1.json

Times are a roofline with stated efficiencies (lvtrain/planning/timing.py), not measurements.
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
    matmul: Annotated[float, typer.Option(help="bfloat16 matmul rate of the GPU, Tflop/s (tools/benchmark.py)")] = 790,
    memory: Annotated[float, typer.Option(help="memory of the GPU, GB")] = 149,
    link: Annotated[float, typer.Option(help="network between nodes, GB/s a GPU")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    # imported here, because they import torch: --help answers at once
    from lvtrain.engine.ds_config import resolve_ds_config
    from lvtrain.methods import MethodSection
    from lvtrain.planning import H200, plan_phases
    from lvtrain.recipe import files as recipes
    from lvtrain.training.checks import sizes

    with one_line_errors("plan", recipe):
        loaded = recipes.load(recipe, overrides or [])
        zero: dict[str, Any] = {"stage": 1}
        if ds_config:
            resolved = resolve_ds_config(ds_config, optimizer=loaded.optimizer, phases=loaded.phases, world_size=ranks)
            zero = resolved["zero_optimization"]
        default = (matmul, memory, link) == (790, 149, 50)
        name = "H200" if default else "GPU"
        device = replace(H200, name=name, matmul=matmul * 1e12, memory=memory * 1e9, link=link * 1e9)
        assert isinstance(loaded.method, MethodSection)
        for key, path in loaded.method.sources().items():
            if not path.exists():
                typer.echo(f"plan: warning: method.{key}: {path} is not here: the plan leaves it out", err=True)
        classes, samples = loaded.data.num_classes, loaded.data.num_samples
        if loaded.data.path.exists():
            classes, samples, _ = sizes(loaded)
        plans = plan_phases(loaded, ranks=ranks, zero=zero, num_classes=classes, device=device)
    if as_json:
        typer.echo(json.dumps({phase: found.as_dict() for phase, found in plans.items()}, indent=1))
        return
    for phase, found in plans.items():
        typer.echo(f"phase {phase}: {found.table()}")
        if samples:
            hours = samples / (found.images_per_second * ranks) / 3600
            typer.echo(f"\nan epoch of {samples:,} images takes {hours:.2f} h at this rate")
        typer.echo("")


if __name__ == "__main__":
    typer.run(main)
