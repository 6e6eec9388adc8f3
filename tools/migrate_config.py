"""Writes a recipe from a configuration file of insightface's arcface_torch, which is parsed and never run.

    python tools/migrate_config.py configs/ms1mv3_r50.py --out recipe.yaml

What the recipe could not take is listed with its line and the reason. configs/base.py is not read: its values are known.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from lvtrain.errors import UserError, one_line_errors

_OF_A_NODE = 8  # GPUs, as in every configuration of arcface_torch for more


def main(
    config: Annotated[Path, typer.Argument(help="a file of arcface_torch's configs/")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="recipe to write; absent: it is printed")] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1, max=65536, help="GPUs that the configuration is for; absent: from the file's name (16gpus), else 8"
        ),
    ] = None,
) -> None:
    """Writes a recipe from CONFIG, and lists what could not be converted."""
    from lvtrain.recipe.arcface_config import read_config  # after parsing: --help answers at once
    from lvtrain.recipe.arcface_migration import migrate

    with one_line_errors("migrate_config", config):
        if out is not None and out.exists():
            raise UserError(f"{out} exists; give another --out, or remove it")
        read = read_config(config)
        ranks, said_by = (gpus, "--gpus") if gpus else _gpus(config.stem)
        try:
            found = migrate(read, name=config.stem, gpus=ranks)
            text = _text(found.recipe, config)
        except UserError as error:
            raise UserError(f"{config}: {error}") from None
        if out is None:
            typer.echo(text, nl=False)
        else:
            from lvtrain.files import atomic

            atomic.write_text(out, text)
    say = lambda line: typer.echo(line, err=out is None)  # noqa: E731
    say(f"{config}: {len(found.taken)} keys taken; batch_size is that of one GPU, for {_count(ranks)} ({said_by})")
    for line, what, why in found.not_taken:
        say(f"  line {line}: not taken: {what}: {why}" if line else f"  not taken: {what}: {why}")
    for remark in found.remarks:
        say(f"  note: {remark}")
    name = shlex.quote(str(out or "RECIPE.yaml"))
    say("Next: import the images, plan, train")
    say(
        f"  python tools/pack_dataset.py {_rec(read.values)} {shlex.quote(found.recipe['data']['path'])} --kind recordio"
    )
    run = f"lvtrain/main.py --recipe {name} --ds_config ds_configs/zero1.json"
    say(f"  python {run} --dry-run --ranks {ranks}")
    per_node = max(gpus for gpus in range(1, _OF_A_NODE + 1) if ranks % gpus == 0)
    if (nodes := ranks // per_node) == 1:
        say(f"  deepspeed {run}")
        return
    several = f"--nnodes {nodes} --nproc_per_node {per_node} --node_rank NUMBER --master_addr FIRST_NODE"
    say(f"  torchrun {several} {run}    # on every node")
    settings = f"LVTRAIN_NODES={nodes} LVTRAIN_GPUS_PER_NODE={per_node}"
    say(f"  {settings} bash slurm/recipe.sh {name} ds_configs/zero1.json    # or on Slurm")


def _count(gpus: int) -> str:
    return "1 GPU" if gpus == 1 else f"{gpus} GPUs"


def _text(values: dict[str, Any], config: Path) -> str:
    """The recipe as YAML, which loads.

    Raises:
        UserError: the recipe would not load.
    """
    import yaml

    from lvtrain.recipe import files as recipes

    recipes.resolve(values)
    source = "".join(letter if letter.isprintable() else "?" for letter in config.name)
    return f"# From arcface_torch's {source}, by tools/migrate_config.py.\n{yaml.safe_dump(values, sort_keys=False)}"


def _gpus(stem: str) -> tuple[int, str]:
    """GPUs as the names of their files say them: 16gpus, 64gpu, onegpu."""
    if "onegpu" in stem:
        return 1, "from the file's name"
    if match := re.search(r"(\d{1,4})gpus?(?![a-z])", stem):
        return max(1, int(match[1])), "from the file's name"
    return 8, "as in arcface_torch's README; if it is for another number, give --gpus"


def _rec(values: dict[str, Any]) -> str:
    folder = values.get("rec")
    return shlex.quote(folder) if isinstance(folder, str) and folder.isprintable() and folder else "FOLDER_OF_TRAIN_REC"


if __name__ == "__main__":
    typer.run(main)
