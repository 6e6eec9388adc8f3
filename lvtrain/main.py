"""The front door: recipe + DeepSpeed JSON -> run.

    deepspeed lvtrain/main.py --recipe lvtrain/recipes/quickstart.yaml --ds_config ds_configs/zero2.json [section.key=value ...]
    torchrun --nproc_per_node 8 lvtrain/main.py ...        srun python lvtrain/main.py ...

Exit status: 0 done; 75 stopped early on request with a checkpoint written, start me again; anything else is an error, told in one line.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

# started as a file, python puts this folder first on the path, where `data` or `state` would hide other people's modules of that name
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from lvtrain import signals
from lvtrain.errors import EXIT_DONE, EXIT_ERROR, UserError, told


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lvtrain", description="Train a face-recognition model from a recipe.")
    parser.add_argument("--recipe", required=True, type=Path, help="YAML recipe, see lvtrain/recipes/")
    parser.add_argument("--ds_config", required=True, type=Path, help="DeepSpeed JSON, see ds_configs/")
    parser.add_argument("--phase", help="run this phase only, and exit when it is over")
    parser.add_argument("--max-time", type=float, metavar="MINUTES", help="stop early enough to have saved by then")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check all that a start would (without the data: the recipe alone), print the plan, train nothing",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe and exit")
    parser.add_argument("--world-size", type=int, help="with --dry-run: plan for this many ranks")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # deepspeed's launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    return parser.parse_intermixed_args(arguments)  # overrides may stand anywhere among the options


def main(arguments: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    signals.listen()  # a request to stop that comes while torch is being imported counts, and must not kill the rank
    try:
        return _run(options)
    except (UserError, OSError) as error:
        if options.debug:
            traceback.print_exc()
        _tell(f"lvtrain: error: {told(error, 'a file of the run')}")
        return (
            EXIT_ERROR if isinstance(error, UserError) else 1
        )  # a disk that fails may work again: a chain tries it, as after a crash
    finally:
        signals.restore()


def _run(options: argparse.Namespace) -> int:
    from lvtrain.recipe import files as recipes

    recipe = recipes.load(options.recipe, options.overrides)
    if options.print_config:
        print(recipes.dump(recipe), end="")
        return EXIT_DONE

    if options.dry_run:
        from lvtrain.training.checks import dry_run

        print(dry_run(recipe, options.ds_config, world_size=options.world_size, only_phase=options.phase))
        return EXIT_DONE

    from lvtrain.distributed import world as worlds
    from lvtrain.engine.ds_config import resolve_ds_config
    from lvtrain.training.checks import check_before_start, open_dataset

    resolve_ds_config(
        options.ds_config, optimizer=recipe.optimizer
    )  # a wrong path is told before anything of the data is
    size = worlds.launch().size
    dataset = open_dataset(recipe)
    ds_config = check_before_start(
        recipe, options.ds_config, num_classes=dataset.num_classes, size=size, only_phase=options.phase
    )

    from lvtrain.training.trainer import train

    limits = {"only_phase": options.phase, "max_minutes": options.max_time}
    return train(recipe, ds_config, dataset, **limits).exit_code


def _tell(line: str) -> None:
    """Once, not once a rank: ranks that fail alike fail with the same words."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    if rank == "0" or not line_is_shared():
        print(line if rank == "0" else f"rank {rank}: {line}", file=sys.stderr, flush=True)


def line_is_shared() -> bool:
    """Errors found before the ranks work together are found by all of them."""
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized())


if __name__ == "__main__":
    sys.exit(main())
