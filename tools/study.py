"""Settings against each other, several seeds each, as one resumable batch: an ablation, or a sweep over a value.

    python tools/study.py tools/studies/pco.yaml                # PCO's three phases against one
    python tools/study.py tools/studies/cluster.yaml            # the cluster paper's settings 1 to 6
    python tools/study.py tools/studies/learning_rate.yaml --recipe MY_RECIPE.yaml --settings 1e-4,3e-4 data.path=/data/mine ...

A study is a YAML file: a recipe, settings (a name, and what it changes in the recipe), seeds, and if wanted generated people to train on and to
test on. Every run is an ordinary one under --out; a finished one is not run again, an interrupted one goes on, and one that failed is named and
does not keep the others from running. The table, and `study.json` beside the runs: mean and standard deviation over seeds of the loss (mean of a
run's last tenth), 10-fold verification on the recipe's benchmarks, and on people never trained on (`unseen`) TAR over all pairs and clustering by
K-means, DBSCAN and agglomeration. --table only prints what is there. `tools/report.py RUN --beside OTHER` draws runs together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import Field, ValidationError
from rich.console import Console
from rich.table import Table

from lvtrain.distributed.world import World
from lvtrain.errors import EXIT_ERROR, EXIT_STOPPED, UserError
from lvtrain.evaluation import allpairs, clustering, suite
from lvtrain.evaluation.sources import labelled_images
from lvtrain.recipe import files as recipes
from lvtrain.recipe.base import Section
from lvtrain.training import outcome
from lvtrain.weights import load_model

ROOT = Path(__file__).resolve().parent.parent
STUDIES = ROOT / "tools" / "studies"


class Generated(Section):
    """What `tools/synth_faces.py` is asked for where there are no data yet."""

    path: Path
    identities: int = Field(gt=1)
    images: int = Field(gt=1, description="pictures a person")
    heldout: int = Field(gt=1, description="people never trained on")
    pairs: int = Field(gt=0)
    difficulty: str = "normal"


class Study(Section):
    recipe: Path
    common: dict[str, Any] = Field(default_factory=dict, description="what every setting changes in the recipe")
    settings: dict[str, dict[str, Any]] = Field(
        min_length=1, description="by name: dotted keys of the recipe and their values"
    )
    seeds: list[int] = Field(default_factory=lambda: [0, 1, 2], min_length=1)
    generated: Generated | None = None
    unseen: Path | None = Field(None, description="a dataset of people never trained on")
    # DBSCAN and agglomeration join at the cosine that this share of pairs of different people reaches, since losses differ in the
    # cosines they lead to; the table's TAR is at it, too
    far: str = Field("1e-02", description="false accept rate of the table")

    def overrides(self, setting: str) -> list[str]:
        return [f"{key}={json.dumps(value)}" for key, value in (self.common | self.settings[setting]).items()]


def read(path: Path) -> Study:
    """Raises UserError, one line, for a file that is no study or a setting that its recipe refuses."""
    try:
        return Study.model_validate(yaml.safe_load(path.read_text()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"study {path} cannot be read: {' '.join(str(error).split())}") from error
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
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--ds-config", type=Path, default=ROOT / "ds_configs" / "zero1.json")
    parser.add_argument("--out", type=Path, help="runs/NAME of the study by default")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table")
    parser.add_argument("overrides", nargs="*", help="section.key=value for every run")
    return parser.parse_intermixed_args(arguments)


class Batch:
    """A study with what the command line changed about it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.study = options, read(options.study)
        self.recipe: Path = options.recipe or self.study.recipe
        self.seeds: list[int] = options.seeds or self.study.seeds
        self.settings: list[str] = options.settings or list(self.study.settings)
        self.out: Path = options.out or Path("runs") / options.study.stem
        unknown = set(self.settings) - set(self.study.settings)
        if unknown:
            raise UserError(f"--settings {','.join(sorted(unknown))}: the study has {', '.join(self.study.settings)}")
        for setting in self.settings:  # before the first run, not after hours of them
            recipes.load(self.recipe, [*self.study.overrides(setting), *options.overrides])

    def folder(self, setting: str, seed: int) -> Path:
        return self.out / f"{setting}_seed{seed}"

    # ------------------------------------------------------------------------------------------------------------- runs

    def run(self) -> list[str]:
        """A line for every run that failed."""
        self._make_data()
        failed = []
        for seed in self.seeds:  # a seed at a time, so that an interrupted table is a fair one
            for setting in self.settings:
                folder = self.folder(setting, seed)
                if not _finished(folder) and not self._train(setting, seed):
                    ended = outcome.read(folder)
                    failed.append(f"{folder.name} failed" + (f" at step {ended.step}: {ended.reason}" if ended else ""))
                elif self.study.unseen and not (folder / "unseen.json").exists():
                    (folder / "unseen.json").write_text(json.dumps(_people(folder, self.study), indent=1) + "\n")
        return failed

    def _make_data(self) -> None:
        made = self.study.generated
        if made is None or (made.path / "heldout.bin").exists():
            return
        sizes = made.model_dump(mode="json", exclude={"path"})
        words = [f"--{name}={value}" for name, value in sizes.items()]
        command = [sys.executable, str(ROOT / "tools" / "synth_faces.py"), str(made.path), *words]
        if subprocess.run(command).returncode:
            raise UserError("the people could not be generated; mend what is said above and start again")

    def _train(self, setting: str, seed: int) -> bool:
        folder, options = self.folder(setting, seed), self.options
        starter = [sys.executable]
        if options.ranks > 1:
            starter = ["torchrun", "--standalone", f"--nproc_per_node={options.ranks}"]
        print(f"== {folder.name}", flush=True)
        code = subprocess.run(
            [
                *starter,
                str(ROOT / "lvtrain" / "main.py"),
                *("--recipe", str(self.recipe), "--ds_config", str(options.ds_config)),
                *(f"name={folder.name}", f"runs={folder.parent}", f"seed={seed}"),
                *self.study.overrides(setting),
                *options.overrides,
            ]
        ).returncode
        ended = outcome.read(folder)
        if code == EXIT_STOPPED or (code and ended is not None and ended.outcome == "requeue"):
            sys.exit(EXIT_STOPPED)
        return code == 0

    # ------------------------------------------------------------------------------------------------------------ table

    def collect(self) -> dict[str, Any]:
        """{setting: {"seeds": [...], "figures": {title: {"mean", "std", "values"}}}}, of what is finished."""
        table: dict[str, Any] = {}
        for setting in self.settings:
            found = {seed: _figures(self.folder(setting, seed), self.study) for seed in self.seeds}
            done = {seed: figures for seed, figures in found.items() if figures}
            if done:
                titles = list(next(iter(done.values())))
                table[setting] = {
                    "seeds": list(done),
                    "figures": {title: _over_seeds([figures[title] for figures in done.values()]) for title in titles},
                }
        return table


def _finished(folder: Path) -> bool:
    ended = outcome.read(folder)
    return ended is not None and ended.outcome == "done"


def _people(folder: Path, study: Study) -> dict[str, Any]:
    """All pairs and clusterings of the people never trained on, from one pass over their pictures."""
    assert study.unseen is not None
    world = World(0, 1, 0, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model = load_model(folder, device=world.device)
    setting = suite.Setting(world=world, device=world.device, image_size=model.image_size)
    images, labels = labelled_images(study.unseen)
    embeddings = setting.embed(model.forward, images)
    pairs = allpairs.all_pairs(embeddings, labels, device=world.device)
    cosine = pairs["tar_at_far"][study.far]["threshold"]
    return {"all_pairs": pairs, "clustering": clustering.run(embeddings, labels, cosine=cosine)}


def _figures(folder: Path, study: Study) -> dict[str, float] | None:
    """What one finished run reached, by title."""
    final, people = folder / "evaluation" / "final.json", folder / "unseen.json"
    if not _finished(folder) or (study.unseen and not people.exists()):
        return None
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figures = {"loss": statistics.fmean(losses[-max(1, len(losses) // 10) :])}
    benchmarks = json.loads(final.read_text())["benchmarks"] if final.exists() else {}
    for name, found in benchmarks.items():
        figures[f"{name} %"] = 100 * found["accuracy"]
        figures[f"{name} pos - neg cosine"] = found["positive_mean"] - found["negative_mean"]
    if study.unseen:
        unseen = json.loads(people.read_text())
        figures[f"TAR@FAR={study.far} %"] = 100 * unseen["all_pairs"]["tar_at_far"][study.far]["tar"]
        figures |= {f"{name} B³F %": 100 * unseen["clustering"][name]["bcubed_f"] for name in clustering.ALGORITHMS}
    return figures


def _over_seeds(values: list[float]) -> dict[str, Any]:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": spread, "values": [round(value, 4) for value in values]}


def show(table: dict[str, Any]) -> None:
    titles = list(next(iter(table.values()))["figures"])
    printed = Table("setting", "seeds", *titles)
    for setting, row in table.items():
        cells = []
        for title in titles:
            figure, digits = row["figures"][title], 2 if title.endswith("%") else 3
            spread = "" if figure["std"] is None else f" ± {figure['std']:.{digits}f}"
            cells.append(f"{figure['mean']:.{digits}f}{spread}")
        printed.add_row(setting, str(len(row["seeds"])), *cells)
    Console(width=160).print(printed)


def main(arguments: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        batch = Batch(options)
        failed = [] if options.table else batch.run()
        table = batch.collect()
        if table:
            (batch.out / "study.json").write_text(json.dumps(table, indent=1) + "\n")
            show(table)
        if failed or not table:
            raise UserError("; ".join(failed) or f"nothing is finished under {batch.out}")
    except UserError as error:
        print(f"study: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
