"""Trains a recipe with several settings and seeds, and prints one table: an ablation, a search over a value, a chain of methods.

    python tools/study.py tools/studies/pco.yaml                # PCO's three phases against one
    python tools/study.py tools/studies/learning_rate.yaml --recipe MY_RECIPE.yaml --settings 1e-4,3e-4 data.path=/data/mine
    python tools/study.py tools/studies/fewshot.yaml study.subsets.shots=[1,4] --ranks 8

A study is a YAML file (tools/studies/README.md lists its keys). Each cell of the grid is a normal run in --out. A finished
cell is not run again, an interrupted one is resumed, and a failed one is reported and does not stop the others. --submit
gives the grid to Slurm as one array job. --table only prints what is finished.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lvtrain.errors import UserError, one_line_errors
from tools.studies.grid import ROOT, Grid


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="YAML file, see tools/studies/")
    parser.add_argument("--recipe", type=Path, help="recipe, instead of the study's")
    parser.add_argument(
        "--seeds",
        type=lambda text: [int(seed) for seed in text.split(",")],
        metavar="N,N,...",
        help="seeds, instead of the study's",
    )
    parser.add_argument(
        "--settings", type=lambda text: text.split(","), metavar="NAME,NAME,...", help="run only these settings"
    )
    parser.add_argument("--ranks", type=int, default=1, help="processes of each run")
    parser.add_argument("--ds_config", type=Path, default=ROOT / "ds_configs" / "zero1.json")
    parser.add_argument("--out", type=Path, help="folder of the runs; default: runs/NAME of the study")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table")
    parser.add_argument("--submit", action="store_true", help="run it as a Slurm array job, one task per cell")
    parser.add_argument("--dry-run", action="store_true", help="with --submit: print the job, submit nothing")
    parser.add_argument("--array", type=int, metavar="N", help="run only cell N (a task of the array does this)")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="section.key=value for every run; study.key=value for the study",
    )
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    from tools.studies import array, table  # after parsing: they import torch

    with one_line_errors("study"):
        grid = Grid(options)
        if options.submit:
            array.submit(grid, arguments)
            return 0
        if options.array is not None:
            if not 0 <= options.array < len(grid.cells):
                raise UserError(
                    f"--array {options.array}: there are {len(grid.cells)} cells, 0 to {len(grid.cells) - 1}"
                )
            failed = grid.run_cell(grid.cells[options.array])
            if failed:
                raise UserError(failed)
            return 0
        failures = []
        if not options.table:
            grid.make_data()
            failures = grid.run()
        rows = table.collect(grid)
        if rows:
            (grid.out / "study.json").write_text(json.dumps(rows, indent=1) + "\n")
            table.show(rows)
        if failures or not rows:
            raise UserError("; ".join(failures) or f"no cell is finished in {grid.out}; run the study without --table")
    return 0


if __name__ == "__main__":
    sys.exit(main())
