"""Trains a recipe: the command line of the trainer.

    deepspeed lvtrain/main.py --recipe lvtrain/recipes/quickstart.yaml --ds_config ds_configs/zero2.json
    torchrun --nproc_per_node 8 lvtrain/main.py ...
    srun python lvtrain/main.py ...

`python -m lvtrain` and the command `lvtrain` do the same. `section.key=value` changes the recipe.

Exit codes: 0 finished; 75 stopped on request with a checkpoint, so the same command continues the run; anything else is an error,
and the last line says what it was.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

# started as a file, Python puts this folder first on the path, and its `data` or `files` would hide packages of that name
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from lvtrain import signals
from lvtrain.errors import EXIT_DONE, EXIT_ERROR, LOST_RANK, UserError, error_line, is_lost_rank, quiet_torch


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes < float("inf"):
        raise ValueError
    return minutes


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line. Exits with a message if it is wrong."""
    parser = argparse.ArgumentParser(prog="lvtrain", description="Train a face-recognition model from a recipe.")
    parser.add_argument("--recipe", required=True, type=Path, help="YAML recipe, see lvtrain/recipes/")
    parser.add_argument("--ds_config", required=True, type=Path, help="DeepSpeed JSON, see ds_configs/")
    parser.add_argument("--phase", help="train this phase only, then exit")
    parser.add_argument(
        "--max-time", type=_minutes, metavar="MINUTES", help="stop, with a checkpoint, before this time"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print the plan, train nothing; needs no GPU and no data",
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="with --dry-run: plan for N GPUs")
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe and exit")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    return parser.parse_intermixed_args(arguments)  # overrides may stand anywhere among the options


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    quiet_torch()
    signals.listen()  # a request to stop that comes while torch is imported must not kill the rank
    try:
        return _run(options)
    except (UserError, OSError) as error:
        if options.debug:
            traceback.print_exc()
        text = error_line(error, "a file of the run")
        if _is_first_to_say(text, error):
            _print(text)
        # a disk that fails may work again: a chain of jobs repeats code 1, as after a crash, and stops at EXIT_ERROR
        return EXIT_ERROR if isinstance(error, UserError) else 1
    except RuntimeError as error:
        if options.debug or not is_lost_rank(error):
            raise
        _print(LOST_RANK)
        return 1
    finally:
        signals.restore()
        if "torch" in sys.modules:
            from lvtrain.distributed import world as worlds

            worlds.forget()  # the next command of this process is another start


def _run(options: argparse.Namespace) -> int:
    from lvtrain.recipe import files as recipes

    recipe = recipes.load(options.recipe, options.overrides)
    if options.print_config:
        print(recipes.dump(recipe), end="")
        return EXIT_DONE
    # imported here, because they import torch, which takes seconds
    from lvtrain.distributed import world as worlds
    from lvtrain.engine.ds_config import resolve_ds_config
    from lvtrain.training.checks import check_before_start, dry_run, open_dataset
    from lvtrain.training.earlier_starts import with_recorded_micro_batches

    # before the data is read, so that a wrong path is reported at once
    resolve_ds_config(options.ds_config, optimizer=recipe.optimizer)
    if options.dry_run:
        print(
            dry_run(
                with_recorded_micro_batches(recipe), options.ds_config, ranks=options.ranks, only_phase=options.phase
            )
        )
        return EXIT_DONE
    dataset = open_dataset(recipe)
    ds_config = check_before_start(
        with_recorded_micro_batches(recipe),
        options.ds_config,
        sizes=(dataset.num_classes, len(dataset)),
        ranks=worlds.launch().size,
        only_phase=options.phase,
    )
    from lvtrain.training.trainer import train

    limits = {"only_phase": options.phase, "max_minutes": options.max_time}
    return train(recipe, ds_config, dataset, **limits).exit_code


def _is_first_to_say(text: str, error: Exception) -> bool:
    """Ranks that fail alike print one line together."""
    if "torch" in sys.modules:
        from lvtrain.distributed import world as worlds

        if worlds.have_met():
            return worlds.is_first_to_say(text, error)
    # what the user got wrong is wrong on all ranks; a disk may fail on this one alone
    return _rank() == "0" or isinstance(error, OSError)


def _print(text: str) -> None:
    who = "" if _rank() == "0" else f"rank {_rank()}: "
    print(f"{who}lvtrain: error: {text}", file=sys.stderr, flush=True)


def _rank() -> str:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))


if __name__ == "__main__":
    sys.exit(main())
