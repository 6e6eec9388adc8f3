"""The few-shot protocol of LAFS as one resumable batch: (share of identities) x (shots) x (start) -> verification, as the paper's Table 3.

    python tools/fewshot.py data/webface4m --fractions 0.01 0.1 --shots 1 2 4 10 all --out runs/fewshot \\
        --start scratch=lvtrain/recipes/finetune_fvitb_webface4m.yaml \\
        --start dino=lvtrain/recipes/finetune_fvitb_webface4m.yaml:runs/dino_fvitb_webface1shot \\
        --start lafs=lvtrain/recipes/finetune_part_fvitb_webface4m.yaml:runs/lafs_part_fvitb_webface1shot \\
        [--ranks 8] [--seeds 0 1 2] [section.key=value ...] [--submit [--dry-run]]

Each cell is a run of its own under --out; a finished one is not run again, an interrupted one goes on from its checkpoint. A start without
a pretrained run begins from the seed and without layer-wise decay, which is made for pretrained layers. `--submit` hands the grid to Slurm
as one array job, a node a cell (partition, GPUs, time: the LVTRAIN_* variables of slurm/site.env); with `--dry-run` it only prints the
script. `--array N` runs cell N alone, which is what the job does; `--table` only prints what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
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
from lvtrain.launch.script import quoted
from lvtrain.launch.site import read_site
from lvtrain.launch.slurm import Slurm
from lvtrain.recipe import files as recipes

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
    parser.add_argument("--submit", action="store_true", help="as a Slurm array job")
    parser.add_argument("--dry-run", action="store_true", help="with --submit: print the job, submit nothing")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table")
    parser.add_argument("overrides", nargs="*", help="section.key=value for every cell")
    return parser.parse_intermixed_args(arguments)


def cells(options: argparse.Namespace) -> list[Cell]:
    shots = [None if text == "all" else int(text) for text in options.shots]
    starts = [Start.parse(text) for text in options.start]
    # a seed's whole grid before the next seed's, so that an unfinished batch still compares like with like
    return [
        Cell(f, k, start, seed) for seed in options.seeds for f in options.fractions for k in shots for start in starts
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
    if cell.start.pretrained is None:
        start = ["init_from=null", "optimizer.layer_decay=null"]
    else:
        start = [f"init_from.path={cell.start.pretrained}"]
    command = [
        *_launcher(options),
        str(ROOT / "lvtrain" / "main.py"),
        *("--recipe", str(cell.start.recipe), "--ds_config", str(options.ds_config)),
        *(
            f"name={cell.name}",
            f"runs={options.out}",
            f"seed={cell.seed}",
            f"data.path={subset(options, cell)}",
            *start,
        ),
        *("data.num_classes=null", "data.num_samples=null"),  # the recipe's are those of the whole dataset
        *options.overrides,
    ]
    print(f"== {cell.name}", flush=True)
    code = subprocess.run(command).returncode
    if code == EXIT_STOPPED:
        sys.exit(EXIT_STOPPED)
    if code:
        raise UserError(f"cell {cell.name} failed with status {code}; mend it and start again, finished cells are kept")


def _launcher(options: argparse.Namespace) -> list[str]:
    if (
        options.array is not None and "SLURM_JOB_ID" in os.environ
    ):  # tasks of a step: Slurm's warning before the time limit reaches them
        return ["srun", f"--ntasks={options.ranks}", "--kill-on-bad-exit=1", sys.executable]
    return ["torchrun", "--standalone", f"--nproc_per_node={options.ranks}"] if options.ranks > 1 else [sys.executable]


# -------------------------------------------------------------------------------------------------------------------- Slurm


def array_script(options: argparse.Namespace, arguments: list[str], number: int) -> str:
    """The batch script of an array of `number` tasks, each one cell; one stopped by the time limit (status 75) is put back in the queue."""
    site = read_site()
    settings = [
        "--job-name=fewshot",
        f"--array=0-{number - 1}",
        "--nodes=1",
        f"--ntasks-per-node={options.ranks}",
        *([f"--gpus-per-node={options.ranks}"] if site.gpus_per_node else []),
        *([f"--cpus-per-task={site.cpus_per_task}"] if site.cpus_per_task else []),
        *(f"--{name}={value}" for name, value in (("mem", site.memory), ("partition", site.partition)) if value),
        *(f"--{name}={value}" for name, value in (("account", site.account), ("qos", site.qos)) if value),
        f"--time={site.time}",
        f"--signal=USR2@{site.signal_seconds}",
        "--requeue",
        "--open-mode=append",
        f"--output={(options.out / 'slurm').absolute()}/cell_%a.log",
        f"--chdir={Path.cwd()}",
        *site.words("sbatch"),
    ]
    words = [word for word in arguments if word not in ("--submit", "--dry-run")]
    cell = shlex.join([sys.executable, str(Path(__file__).resolve()), *words])
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {quoted(setting)}" for setting in settings),
        *([f"module load {site.modules}"] if site.modules else []),
        *([f". {shlex.quote(site.setup)}"] if site.setup else []),
        "code=0",
        f'{cell} --array "$SLURM_ARRAY_TASK_ID" || code=$?',
        f'if [ $code -eq {EXIT_STOPPED} ]; then exec scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"; fi',
        "exit $code",
    ]
    return "\n".join(lines) + "\n"


def submit(options: argparse.Namespace, arguments: list[str], grid: list[Cell]) -> None:
    """Submits the array, or prints its script. Subsets are written first: tasks that begin together must not write one file."""
    script = array_script(options, arguments, len(grid))
    if options.dry_run:
        print(script, end="")
        return
    for cell in grid:
        subset(options, cell)
    path = options.out / "slurm" / "array.sbatch"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    print(f"{len(grid)} cells as job {Slurm().submit(path)}; `--table` prints what is there")


# -------------------------------------------------------------------------------------------------------------------- table


def result(options: argparse.Namespace, cell: Cell) -> dict[str, float] | None:
    """Of the finished cell, by benchmark: accuracy of 1:1 verification, percent."""
    path = options.out / cell.name / "evaluation" / "final.json"
    if not path.exists():
        return None
    benchmarks = json.loads(path.read_text())["benchmarks"]
    return {name: 100 * figures["accuracy"] for name, figures in benchmarks.items()}


Summary = dict[str, list[dict[str, object]]]


def summarise(options: argparse.Namespace, grid: list[Cell]) -> Summary:
    """By benchmark, one entry for every (share, start, shots) there is a result of: the seeds' accuracies, their mean and standard deviation."""
    summary: Summary = {}
    groups: dict[tuple[float, str, int | None], list[Cell]] = {}
    for cell in grid:
        groups.setdefault((cell.fraction, cell.start.name, cell.shots), []).append(cell)
    for (fraction, start, shots), members in groups.items():
        found = [figures for cell in members if (figures := result(options, cell))]
        for benchmark in found[0] if found else ():
            values = [figures[benchmark] for figures in found]
            entry = {
                "fraction": fraction,
                "start": start,
                "backbone": recipes.load(members[0].start.recipe).backbone.name,
                "shots": shots or "all",
                "accuracies": values,
                "mean": statistics.mean(values),
                "std": statistics.stdev(values) if len(values) > 1 else 0.0,
            }
            summary.setdefault(benchmark, []).append(entry)
    return summary


def print_table(summary: Summary, shots: list[str]) -> None:
    """The paper's Table 3: a block of rows a share of the identities, a row a pretraining and backbone, a column a number of shots."""
    for benchmark, entries in summary.items():
        columns = ["Data amount", "Pretrain method", "Backbone", *(f"{k} shot" if k != "all" else "all" for k in shots)]
        shown = Table(*columns, title=f"{benchmark}: verification accuracy, %, mean ± standard deviation over seeds")
        before = None
        for fraction, start in dict.fromkeys((entry["fraction"], entry["start"]) for entry in entries):
            row = {str(e["shots"]): e for e in entries if (e["fraction"], e["start"]) == (fraction, start)}
            backbone = str(next(iter(row.values()))["backbone"])
            texts = [_text(row[k]) if k in row else "" for k in shots]
            if before not in (None, fraction):
                shown.add_section()
            shown.add_row(
                "" if before == fraction else f"{100 * float(str(fraction)):g}%", str(start), backbone, *texts
            )
            before = fraction
        Console(width=160).print(shown)


def _text(entry: dict[str, object]) -> str:
    several = isinstance(entry["accuracies"], list) and len(entry["accuracies"]) > 1
    return f"{entry['mean']:.2f}" + (f" ± {entry['std']:.2f}" if several else "")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    try:
        grid = cells(options)
        if options.submit:
            submit(options, arguments, grid)
            return 0
        if options.array is not None:
            if not 0 <= options.array < len(grid):
                raise UserError(f"--array {options.array}: there are {len(grid)} cells, 0 to {len(grid) - 1}")
            run(options, grid[options.array])
            return 0
        for cell in [] if options.table else grid:
            run(options, cell)
        summary = summarise(options, grid)
        print_table(summary, options.shots)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "table.json").write_text(json.dumps(summary, indent=1))
        return 0
    except UserError as error:
        print(f"fewshot: error: {error}", file=sys.stderr)
        return EXIT_ERROR


if __name__ == "__main__":
    sys.exit(main())
