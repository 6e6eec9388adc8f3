"""The few-shot protocol of LAFS as one resumable batch: (share of identities) x (shots) x (start) -> verification, as the paper's Table 3.

    python tools/fewshot.py data/webface4m --fractions 0.01 0.1 --shots 1 2 4 10 all --out runs/fewshot \\
        --start scratch=lvtrain/recipes/finetune_fvitb_webface4m.yaml \\
        --start dino=lvtrain/recipes/finetune_fvitb_webface4m.yaml:runs/dino_fvitb_webface1shot \\
        --start lafs=lvtrain/recipes/finetune_part_fvitb_webface4m.yaml:runs/lafs_part_fvitb_webface1shot \\
        [--ranks 8] [--seeds 0 1 2] [--array 3] [section.key=value ...]

Each cell is a run of its own under --out; a finished one is not run again, an interrupted one goes on from its checkpoint. `--array N` runs
only cell N (0-based), for a Slurm array: `sbatch --array=0-29 --wrap "python tools/fewshot.py ... --array \\$SLURM_ARRAY_TASK_ID"`.
`--table` only prints what is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lvtrain.data.shards import ShardDataset
from lvtrain.data.subset import choose, write_subset
from lvtrain.errors import EXIT_ERROR, EXIT_STOPPED, UserError

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Start:
    """Where a cell's weights come from: a recipe, and a pretrained run or None for scratch."""

    name: str
    recipe: Path
    pretrained: Path | None

    @classmethod
    def parse(cls, text: str) -> Start:
        name, equals, rest = text.partition("=")
        recipe, _, pretrained = rest.partition(":")
        if not equals or not Path(recipe).is_file():
            raise UserError(
                f"--start {text}: write NAME=RECIPE.yaml or NAME=RECIPE.yaml:PRETRAINED_RUN; {recipe or 'the recipe'} is no file"
            )
        if pretrained and not Path(pretrained).exists():
            raise UserError(f"--start {text}: {pretrained} does not exist; pretrain it first")
        return cls(name, Path(recipe), Path(pretrained) if pretrained else None)


@dataclass(frozen=True)
class Cell:
    fraction: float
    shots: int | None
    start: Start
    seed: int

    @property
    def name(self) -> str:
        return f"{100 * self.fraction:g}percent_{self.shots or 'all'}shot_{self.start.name}_seed{self.seed}"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/fewshot"))
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.01, 0.1])
    parser.add_argument("--shots", nargs="+", default=["1", "2", "4", "10", "all"])
    parser.add_argument("--start", action="append", required=True, help="NAME=RECIPE.yaml[:PRETRAINED_RUN]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--ds-config", type=Path, default=ROOT / "ds_configs" / "zero1.json")
    parser.add_argument("--array", type=int, help="run only this cell")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table")
    parser.add_argument("overrides", nargs="*", help="section.key=value for every cell")
    return parser.parse_intermixed_args(arguments)


def cells(options: argparse.Namespace) -> list[Cell]:
    shots = [None if text == "all" else int(text) for text in options.shots]
    starts = [Start.parse(text) for text in options.start]
    return [
        Cell(f, k, start, seed) for f in options.fractions for k in shots for start in starts for seed in options.seeds
    ]


def subset(options: argparse.Namespace, cell: Cell) -> Path:
    """The manifest of the cell's identities and shots: the same for every start of one seed."""
    path: Path = (
        options.out / "subsets" / f"{100 * cell.fraction:g}percent_{cell.shots or 'all'}shot_seed{cell.seed}.json"
    )
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset = ShardDataset(options.dataset)
        ids = choose(dataset, fraction=cell.fraction, shots=cell.shots, seed=cell.seed)
        write_subset(path, dataset, ids, criteria={"fraction": cell.fraction, "shots": cell.shots}, seed=cell.seed)
    return path


def run(options: argparse.Namespace, cell: Cell) -> None:
    if result(options, cell) is not None:
        return
    start = "init_from=null" if cell.start.pretrained is None else f"init_from.path={cell.start.pretrained}"
    command = [
        *(["torchrun", "--standalone", f"--nproc_per_node={options.ranks}"] if options.ranks > 1 else [sys.executable]),
        str(ROOT / "lvtrain" / "main.py"),
        *("--recipe", str(cell.start.recipe), "--ds_config", str(options.ds_config)),
        *(f"name={cell.name}", f"runs={options.out}", f"seed={cell.seed}", f"data.path={subset(options, cell)}", start),
        *options.overrides,
    ]
    print(f"== {cell.name}", flush=True)
    code = subprocess.run(command).returncode
    if code == EXIT_STOPPED:
        sys.exit(EXIT_STOPPED)
    if code:
        raise UserError(f"cell {cell.name} failed with status {code}; mend it and start again, finished cells are kept")


def result(options: argparse.Namespace, cell: Cell) -> dict[str, float] | None:
    """Accuracy and TAR at FAR 1e-3 of the finished cell by benchmark, in percent."""
    path = options.out / cell.name / "evaluation" / "final.json"
    if not path.exists():
        return None
    benchmarks = json.loads(path.read_text())["benchmarks"]
    return {name: 100 * figures["accuracy"] for name, figures in benchmarks.items()}


def table(options: argparse.Namespace, grid: list[Cell]) -> dict[str, dict[str, dict[str, float | int]]]:
    """Mean and standard deviation over seeds by row, column and benchmark; also printed."""
    columns = [f"{100 * f:g}% {k}-shot" for f in options.fractions for k in options.shots]
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for cell in grid:
        column = f"{100 * cell.fraction:g}% {cell.shots or 'all'}-shot"
        for benchmark, value in (result(options, cell) or {}).items():
            found.setdefault(benchmark, {}).setdefault(cell.start.name, {}).setdefault(column, []).append(value)
    summary: dict[str, dict[str, dict[str, float | int]]] = {}
    for benchmark, rows in found.items():
        shown = Table("start", *columns, title=f"{benchmark}: verification accuracy, %")
        for start, values in rows.items():
            texts = []
            for column in columns:
                given = values.get(column, [])
                spread = f" ± {statistics.stdev(given):.2f}" if len(given) > 1 else ""
                texts.append(f"{statistics.mean(given):.2f}{spread}" if given else "")
                if given:
                    entry = {
                        "mean": statistics.mean(given),
                        "std": statistics.stdev(given) if len(given) > 1 else 0.0,
                        "seeds": len(given),
                    }
                    summary.setdefault(benchmark, {})[f"{start}, {column}"] = entry
            shown.add_row(start, *texts)
        Console(width=200).print(shown)
    return summary


def main(arguments: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        grid = cells(options)
        if options.array is not None and not 0 <= options.array < len(grid):
            raise UserError(f"--array {options.array}: there are {len(grid)} cells, 0 to {len(grid) - 1}")
        if not options.table:
            for cell in grid if options.array is None else [grid[options.array]]:
                run(options, cell)
        summary = table(options, grid)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "table.json").write_text(json.dumps(summary, indent=1))
        return 0
    except UserError as error:
        print(f"fewshot: error: {error}", file=sys.stderr)
        return EXIT_ERROR


if __name__ == "__main__":
    sys.exit(main())
