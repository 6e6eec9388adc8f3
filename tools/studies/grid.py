"""The cells of a study, and how each is trained."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lvtrain.errors import EXIT_STOPPED, UserError
from lvtrain.recipe import files as recipes
from lvtrain.training import outcome
from tools.studies.definition import read

if TYPE_CHECKING:
    from lvtrain.data import ShardDataset

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Cell:
    """One run of the grid. `fraction` and `shots` are None without subsets; in a subset, `shots` None means all images.

    `pretraining` is the seed of the pretraining that it starts from; `is_first`: it is such a pretraining itself.
    """

    setting: str
    seed: int
    fraction: float | None = None
    shots: int | None = None
    pretraining: int | None = None
    is_first: bool = False

    @property
    def subset(self) -> str:
        if self.fraction is None:
            return ""
        return f"{100 * self.fraction:g}percent_{self.shots or 'all'}shot"

    @property
    def name(self) -> str:
        if self.is_first:
            return f"{self.setting}_p{self.seed}"
        start = [] if self.pretraining is None else [f"p{self.pretraining}"]
        return "_".join([*([self.subset] if self.subset else []), self.setting, *start, f"seed{self.seed}"])


class Grid:
    """A study, with the changes of the command line."""

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
        # all cells of one seed come first, so that the table of an interrupted study is balanced
        grid = [Cell(s, seed, f, k, p) for seed in self.seeds for f, k in places for s, p in self._starts()]
        needed = {other for setting in self.settings for other in self.study.starts(setting)}
        first = [name for name in self.study.pretraining if name in needed]
        # a pretraining comes right before the first cell that starts from it
        self.cells: list[Cell] = []
        for seed in self.study.pretraining_seeds if first else [None]:
            self.cells += [Cell(name, seed, is_first=True) for name in first if seed is not None]
            self.cells += [cell for cell in grid if cell.pretraining in (seed, None) and cell not in self.cells]
        for setting in [*first, *self.settings]:  # find a wrong setting now, not after hours of runs
            recipes.load(self.recipe(setting), self.changes(Cell(setting, self.seeds[0])))

    def _starts(self) -> list[tuple[str, int | None]]:
        """Settings and the seeds of the pretrainings that each starts from."""
        seeds: list[int | None] = list(self.study.pretraining_seeds)
        return [(s, p) for s in self.settings for p in (seeds if self.study.starts(s) else [None])]

    def recipe(self, setting: str) -> Path:
        path = Path(self.study.values(setting).get("recipe") or self.options.recipe or self.study.recipe)
        return path if path.exists() else ROOT / path  # our studies give recipes relative to the repository

    def changes(self, cell: Cell) -> list[str]:
        """The overrides of a cell's run, without those that every run has."""
        words = self.study.overrides(cell.setting)
        start = cell.seed if cell.is_first or cell.pretraining is None else cell.pretraining
        for name, filled in (("{out}", str(self.out)), ("{seed}", str(cell.seed)), ("{pretraining}", str(start))):
            words = [word.replace(name, filled) for word in words]
        return [*words, *self.overrides]

    def folder(self, cell: Cell) -> Path:
        return self.out / cell.name

    # ------------------------------------------------------------------------------------------------------------- runs

    def run(self) -> list[str]:
        """Runs every cell that is not finished. Returns a line for each one that failed."""
        return [line for cell in self.cells if (line := self.run_cell(cell))]

    def run_cell(self, cell: Cell) -> str | None:
        folder = self.folder(cell)
        if not finished(folder) and not self._train(cell):
            ended = outcome.read(folder)
            return f"{folder.name} failed" + (f" at step {ended.step}: {ended.reason}" if ended else "")
        if self.study.unseen and not (folder / "unseen.json").exists():
            from tools.studies.unseen import unseen_identities  # imports torch, which the grid does not need

            (folder / "unseen.json").write_text(
                json.dumps(unseen_identities(folder, self.study.unseen, self.study.far), indent=1) + "\n"
            )
        return None

    def make_data(self) -> None:
        """Writes generated faces and subset manifests before the first run: two tasks must not write one file."""
        for made in self.study.generated:
            if (made.path / "heldout.bin").exists():
                continue
            sizes = made.model_dump(mode="json", exclude={"path"})
            words = [f"--{name}={value}" for name, value in sizes.items()]
            command = [sys.executable, str(ROOT / "tools" / "synth_faces.py"), str(made.path), *words]
            if subprocess.run(command).returncode:
                raise UserError("the faces could not be generated; fix the error above and start again")
        if (subsets := self.study.subsets) is not None:
            from lvtrain.data import ShardDataset

            dataset = ShardDataset(subsets.dataset)
            for cell in self.cells:
                if cell.fraction is not None:
                    _write(self._manifest(cell), dataset, fraction=cell.fraction, shots=cell.shots, seed=cell.seed)
        for path, wanted in self.study.manifests.items():
            from lvtrain.data import ShardDataset

            _write(path, ShardDataset(wanted.dataset), fraction=wanted.fraction, shots=wanted.shots, seed=wanted.seed)

    def _manifest(self, cell: Cell) -> Path:
        """Manifest of the cell's subset, which is the same for every setting of one seed."""
        return self.out / "subsets" / f"{cell.subset}_seed{cell.seed}.json"

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
            # as a job step: then Slurm's warning before the time limit reaches the ranks
            return ["srun", f"--ntasks={ranks}", "--kill-on-bad-exit=1", sys.executable]
        return ["torchrun", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else [sys.executable]


def _write(path: Path, dataset: ShardDataset, *, fraction: float, shots: int | None, seed: int) -> None:
    """Writes a subset's manifest, if it does not exist."""
    from lvtrain.datasets.subset import choose, write_subset

    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = choose(dataset, fraction=fraction, shots=shots, seed=seed)
    write_subset(path, dataset, ids, criteria={"fraction": fraction, "shots": shots}, seed=seed)


def finished(folder: Path) -> bool:
    """Whether the run in `folder` reached its end."""
    ended = outcome.read(folder)
    return ended is not None and ended.outcome == "done"
