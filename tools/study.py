"""Runs a grid of settings over seeds, and prints one table: an ablation, a sweep over a value, a chain of methods, a few-shot grid.

    python tools/study.py tools/studies/pco.yaml                # PCO's three phases against one
    python tools/study.py tools/studies/learning_rate.yaml --recipe MY_RECIPE.yaml --settings 1e-4,3e-4 data.path=/data/mine
    python tools/study.py tools/studies/fewshot.yaml study.subsets.shots=[1,4] --ranks 8

A study is a YAML file (tools/studies/README.md lists its keys). Each cell of the grid is an ordinary run below --out. A finished
cell is not run again, an interrupted one goes on, and a failed one is named and does not stop the others. --submit hands the
grid to Slurm as one array job; --table only prints what is there.
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
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import Field, ValidationError

from lvtrain.errors import EXIT_ERROR, EXIT_STOPPED, UserError
from lvtrain.recipe import files as recipes
from lvtrain.recipe.base import Section
from lvtrain.training import outcome

if TYPE_CHECKING:
    from lvtrain.data import ShardDataset

ROOT = Path(__file__).resolve().parent.parent
STUDIES = ROOT / "tools" / "studies"


class Generated(Section):
    """Faces that `tools/synth_faces.py` makes where there are none yet."""

    path: Path
    identities: int = Field(gt=1)
    images: int = Field(gt=1, description="per identity")
    heldout: int = Field(gt=1, description="identities never trained on")
    pairs: int = Field(gt=0)
    difficulty: str = "normal"


class Subsets(Section):
    """Few-shot subsets of one dataset: every setting is trained on each of them."""

    dataset: Path
    fractions: list[float] = Field(min_length=1, description="shares of the identities")
    shots: list[int | None] = Field(min_length=1, description="images per identity; null is all")


class Study(Section):
    recipe: Path = Field(description="of every setting that does not name its own")
    common: dict[str, Any] = Field(default_factory=dict, description="what every setting changes in its recipe")
    settings: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="by name: dotted keys of the recipe and their values; `recipe` takes another recipe. {out} and "
        "{seed} in a text stand for the study's folder and the seed, so that a setting can start from an earlier one",
    )
    seeds: list[int] = Field(default_factory=lambda: [0, 1, 2], min_length=1)
    generated: Generated | None = None
    subsets: Subsets | None = None
    unseen: Path | None = Field(None, description="a dataset of identities never trained on")
    # DBSCAN and agglomeration join at the cosine of this false accept rate, because losses lead to different cosines
    far: str = Field("1e-02", description="false accept rate of the table")

    def overrides(self, setting: str) -> list[str]:
        """What the setting changes in its recipe, as `key=value` words."""
        values = self.common | self.settings[setting]
        return [f"{key}={json.dumps(value)}" for key, value in values.items() if key != "recipe"]


def read(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Study:
    """A study file with `study.key=value` overrides.

    Raises:
        UserError: the file is not a study, or an override does not fit.
    """
    try:
        values = {"study": yaml.safe_load(path.read_text())}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"study {path} cannot be read: {' '.join(str(error).split())}") from error
    for override in overrides:
        recipes.apply(values, override)
    try:
        return Study.model_validate(values["study"])
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise UserError(f"study {path}: {'; '.join(wrong)}") from error


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="YAML file, see tools/studies/")
    parser.add_argument("--recipe", type=Path, help="instead of the study's")
    parser.add_argument(
        "--seeds",
        type=lambda text: [int(seed) for seed in text.split(",")],
        metavar="N,N,...",
        help="instead of the study's",
    )
    parser.add_argument("--settings", type=lambda text: text.split(","), metavar="NAME,NAME,...", help="only these")
    parser.add_argument("--ranks", type=int, default=1, help="of each run")
    parser.add_argument("--ds_config", type=Path, default=ROOT / "ds_configs" / "zero1.json")
    parser.add_argument("--out", type=Path, help="runs/NAME of the study by default")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table")
    parser.add_argument("--submit", action="store_true", help="as a Slurm array job, one cell a task")
    parser.add_argument("--dry-run", action="store_true", help="with --submit: print the job, submit nothing")
    parser.add_argument("--array", type=int, metavar="N", help="run only cell N (a task of the array does this)")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="section.key=value for every run; study.key=value for the study",
    )
    return parser.parse_intermixed_args(arguments)


@dataclass(frozen=True)
class Cell:
    """One run of the grid. `fraction` and `shots` are None without subsets; `shots` None within one means all images."""

    setting: str
    seed: int
    fraction: float | None = None
    shots: int | None = None

    @property
    def subset(self) -> str:
        if self.fraction is None:
            return ""
        return f"{100 * self.fraction:g}percent_{self.shots or 'all'}shot"

    @property
    def name(self) -> str:
        return "_".join([*([self.subset] if self.subset else []), self.setting, f"seed{self.seed}"])


class Grid:
    """A study with what the command line changed about it."""

    def __init__(self, options: argparse.Namespace) -> None:
        own = [word for word in options.overrides if word.startswith("study.")]
        self.options, self.study = options, read(options.study, own)
        self.overrides: list[str] = [word for word in options.overrides if word not in own]
        self.seeds: list[int] = options.seeds or self.study.seeds
        self.settings: list[str] = options.settings or list(self.study.settings)
        self.out: Path = options.out or Path("runs") / options.study.stem
        unknown = set(self.settings) - set(self.study.settings)
        if unknown:
            raise UserError(f"--settings {','.join(sorted(unknown))}: the study has {', '.join(self.study.settings)}")
        subsets = self.study.subsets
        places = [(f, k) for f in subsets.fractions for k in subsets.shots] if subsets else [(None, None)]
        # one seed's whole grid before the next seed's, so that an interrupted table compares like with like
        self.cells = [Cell(s, seed, f, k) for seed in self.seeds for f, k in places for s in self.settings]
        for setting in self.settings:  # refuse a wrong setting now, not after hours of runs
            recipes.load(self.recipe(setting), self.changes(Cell(setting, self.seeds[0])))

    def recipe(self, setting: str) -> Path:
        path = Path(self.study.settings[setting].get("recipe") or self.options.recipe or self.study.recipe)
        return path if path.exists() else ROOT / path  # a study of ours names its recipe from the repository's folder

    def changes(self, cell: Cell) -> list[str]:
        """The overrides of a cell's run, without those that are the same in every run."""
        words = self.study.overrides(cell.setting)
        for name, filled in (("{out}", str(self.out)), ("{seed}", str(cell.seed))):
            words = [word.replace(name, filled) for word in words]
        return [*words, *self.overrides]

    def folder(self, cell: Cell) -> Path:
        return self.out / cell.name

    # ------------------------------------------------------------------------------------------------------------- runs

    def run(self) -> list[str]:
        """Runs every cell that is not finished; returns a line for each one that failed."""
        return [line for cell in self.cells if (line := self.run_cell(cell))]

    def run_cell(self, cell: Cell) -> str | None:
        folder = self.folder(cell)
        if not _finished(folder) and not self._train(cell):
            ended = outcome.read(folder)
            return f"{folder.name} failed" + (f" at step {ended.step}: {ended.reason}" if ended else "")
        if self.study.unseen and not (folder / "unseen.json").exists():
            (folder / "unseen.json").write_text(json.dumps(_unseen_identities(folder, self.study), indent=1) + "\n")
        return None

    def make_data(self) -> None:
        """Generated faces and subset manifests, before the first run: tasks that begin together must not write one file."""
        made = self.study.generated
        if made is not None and not (made.path / "heldout.bin").exists():
            sizes = made.model_dump(mode="json", exclude={"path"})
            words = [f"--{name}={value}" for name, value in sizes.items()]
            command = [sys.executable, str(ROOT / "tools" / "synth_faces.py"), str(made.path), *words]
            if subprocess.run(command).returncode:
                raise UserError("the faces could not be generated; fix what is printed above and start again")
        if (subsets := self.study.subsets) is not None:
            from lvtrain.data import ShardDataset

            dataset = ShardDataset(subsets.dataset)
            for cell in self.cells:
                self._write_subset(dataset, cell)

    def _manifest(self, cell: Cell) -> Path:
        """The same identities and images for every setting of one seed."""
        return self.out / "subsets" / f"{cell.subset}_seed{cell.seed}.json"

    def _write_subset(self, dataset: ShardDataset, cell: Cell) -> None:
        from lvtrain.datasets.subset import choose, write_subset

        path = self._manifest(cell)
        if path.exists():
            return
        assert cell.fraction is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        criteria = {"fraction": cell.fraction, "shots": cell.shots}
        ids = choose(dataset, fraction=cell.fraction, shots=cell.shots, seed=cell.seed)
        write_subset(path, dataset, ids, criteria=criteria, seed=cell.seed)

    def _train(self, cell: Cell) -> bool:
        folder, subset = self.folder(cell), []
        if cell.fraction is not None:  # the recipe's counts are those of the whole dataset
            subset = [f"data.path={self._manifest(cell)}", "data.num_classes=null", "data.num_samples=null"]
        print(f"== {folder.name}", flush=True)
        code = subprocess.run(
            [
                *self._launcher(),
                str(ROOT / "lvtrain" / "main.py"),
                *("--recipe", str(self.recipe(cell.setting)), "--ds_config", str(self.options.ds_config)),
                *(f"name={folder.name}", f"runs={folder.parent}", f"seed={cell.seed}"),
                *subset,
                *self.changes(cell),
            ]
        ).returncode
        ended = outcome.read(folder)
        if code == EXIT_STOPPED or (code and ended is not None and ended.outcome == "requeue"):
            sys.exit(EXIT_STOPPED)
        return code == 0

    def _launcher(self) -> list[str]:
        ranks = self.options.ranks
        if self.options.array is not None and "SLURM_JOB_ID" in os.environ:
            # tasks of a job step: Slurm's warning before the time limit reaches them
            return ["srun", f"--ntasks={ranks}", "--kill-on-bad-exit=1", sys.executable]
        return ["torchrun", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else [sys.executable]

    # ------------------------------------------------------------------------------------------------------------ Slurm

    def array_script(self, arguments: list[str]) -> str:
        """The batch script of an array with one task a cell. A task that stopped on request goes back into the queue."""
        from lvtrain.launch.script import quoted
        from lvtrain.launch.site import read_site

        site, ranks = read_site(), self.options.ranks
        settings = [
            f"--job-name={self.options.study.stem}",
            f"--array=0-{len(self.cells) - 1}",
            "--nodes=1",
            f"--ntasks-per-node={ranks}",
            *([f"--gpus-per-node={ranks}"] if site.gpus_per_node else []),
            *([f"--cpus-per-task={site.cpus_per_task}"] if site.cpus_per_task else []),
            *(f"--{name}={value}" for name, value in (("mem", site.memory), ("partition", site.partition)) if value),
            *(f"--{name}={value}" for name, value in (("account", site.account), ("qos", site.qos)) if value),
            f"--time={site.time}",
            f"--signal=USR2@{site.signal_seconds}",
            "--requeue",
            "--open-mode=append",
            f"--output={(self.out / 'slurm').absolute()}/cell_%a.log",
            f"--chdir={Path.cwd()}",
            *site.words("sbatch"),
        ]
        words = [word for word in arguments if word not in ("--submit", "--dry-run")]
        cell = shlex.join([sys.executable, str(Path(__file__).resolve()), *words])
        task = '"${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"'
        lines = [
            "#!/bin/bash",
            *(f"#SBATCH {quoted(setting)}" for setting in settings),
            *([f"module load {site.modules}"] if site.modules else []),
            *([f". {shlex.quote(site.setup)}"] if site.setup else []),
            "code=0",
            f'{cell} --array "$SLURM_ARRAY_TASK_ID" || code=$?',
            f"if [ $code -eq {EXIT_STOPPED} ]; then exec scontrol requeue {task}; fi",
            "exit $code",
        ]
        return "\n".join(lines) + "\n"

    def submit(self, arguments: list[str]) -> None:
        from lvtrain.launch.slurm import Slurm

        script = self.array_script(arguments)
        if self.options.dry_run:
            print(script, end="")
            return
        if any("{out}" in json.dumps(self.study.settings[setting]) for setting in self.settings):
            raise UserError(
                "--submit runs cells at the same time, but a setting starts from another one; run it without"
            )
        self.make_data()
        path = self.out / "slurm" / "array.sbatch"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script)
        print(f"{len(self.cells)} cells as job {Slurm().submit(path)}; --table prints what is there")

    # ------------------------------------------------------------------------------------------------------------ table

    def collect(self) -> list[dict[str, Any]]:
        """A row for every setting (of every subset) with a finished cell: `{setting, subset…, seeds, figures}`, where
        `figures` is `{title: {mean, std, values}}` over the seeds."""
        rows = []
        for place in dict.fromkeys((cell.fraction, cell.shots, cell.setting) for cell in self.cells):
            members = [cell for cell in self.cells if (cell.fraction, cell.shots, cell.setting) == place]
            found = {cell.seed: _figures(self.folder(cell), self.study) for cell in members}
            done = {seed: figures for seed, figures in found.items() if figures}
            if not done:
                continue
            titles = list(next(iter(done.values())))
            row: dict[str, Any] = {"setting": members[0].setting}
            if members[0].fraction is not None:
                row |= {"fraction": members[0].fraction, "shots": members[0].shots or "all"}
            figures = {title: _over_seeds([values[title] for values in done.values()]) for title in titles}
            rows.append(row | {"seeds": list(done), "figures": figures})
        return rows


def _finished(folder: Path) -> bool:
    ended = outcome.read(folder)
    return ended is not None and ended.outcome == "done"


def _unseen_identities(folder: Path, study: Study) -> dict[str, Any]:
    """All pairs and clusterings of identities never trained on, from one pass over their images."""
    import torch

    from lvtrain.distributed.world import World
    from lvtrain.evaluation import allpairs, clustering, suite
    from lvtrain.evaluation.sources import labelled_images
    from lvtrain.weights import load_model

    assert study.unseen is not None
    world = World(0, 1, 0, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model = load_model(folder, device=world.device)
    setting = suite.Setting(world, world.device, image_size=model.image_size)
    images, labels = labelled_images(study.unseen)
    embeddings = setting.embed(model.forward, images)
    pairs = allpairs.all_pairs(embeddings, labels, device=world.device)
    cosine = pairs["tar_at_far"][study.far]["threshold"]
    return {"all_pairs": pairs, "clustering": clustering.run(embeddings, labels, cosine=cosine)}


def _figures(folder: Path, study: Study) -> dict[str, float] | None:
    """What one finished run reached, by title."""
    from lvtrain.evaluation import suite

    final, identities = folder / "evaluation" / "final.json", folder / "unseen.json"
    if not _finished(folder) or (study.unseen and not identities.exists()):
        return None
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figures = {"loss": statistics.fmean(losses[-max(1, len(losses) // 10) :])}
    benchmarks = json.loads(final.read_text())["benchmarks"] if final.exists() else {}
    for name, found in benchmarks.items():
        figures[f"{name} %"] = 100 * suite.figure(found)
        if found["kind"] == "verification":
            figures[f"{name} pos - neg cosine"] = found["positive_mean"] - found["negative_mean"]
    if study.unseen:
        unseen = json.loads(identities.read_text())
        figures[f"TAR@FAR={study.far} %"] = 100 * unseen["all_pairs"]["tar_at_far"][study.far]["tar"]
        figures |= {
            f"{name} B³F %": 100 * found["bcubed_f"]
            for name, found in unseen["clustering"].items()
            if isinstance(found, dict)
        }
    return figures


def _over_seeds(values: list[float]) -> dict[str, Any]:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": spread, "values": [round(value, 4) for value in values]}


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table, figures as mean ± standard deviation over seeds."""
    from rich.console import Console
    from rich.table import Table

    titles = list(dict.fromkeys(title for row in rows for title in row["figures"]))
    subset = "fraction" in rows[0]
    printed = Table(*(["identities", "shots"] if subset else []), "setting", "seeds", *titles)
    for row in rows:
        place = [f"{100 * row['fraction']:g}%", str(row["shots"])] if subset else []
        printed.add_row(
            *place, row["setting"], str(len(row["seeds"])), *(_cell(row["figures"].get(t), t) for t in titles)
        )
    Console(width=160).print(printed)


def _cell(figure: dict[str, Any] | None, title: str) -> str:
    if figure is None:
        return ""
    digits = 2 if title.endswith("%") else 3
    spread = "" if figure["std"] is None else f" ± {figure['std']:.{digits}f}"
    return f"{figure['mean']:.{digits}f}{spread}"


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    try:
        grid = Grid(options)
        if options.submit:
            grid.submit(arguments)
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
        rows = grid.collect()
        if rows:
            (grid.out / "study.json").write_text(json.dumps(rows, indent=1) + "\n")
            show(rows)
        if failures or not rows:
            raise UserError("; ".join(failures) or f"nothing is finished under {grid.out}")
    except UserError as error:
        print(f"study: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
