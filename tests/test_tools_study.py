"""A study: its published files, real settings over one seed, a failing one, few-shot subsets, a chain, and the Slurm array."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from lvtrain.data import ShardDataset
from lvtrain.errors import EXIT_ERROR
from lvtrain.recipe import files as recipes
from tests.conftest import ROOT
from tests.runs import recipe_file
from tools import study
from tools.studies.grid import Cell, Grid


@pytest.mark.parametrize("path", sorted((ROOT / "tools" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_settings_of_published_studies_differ(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # a study of ours finds its recipes from any folder
    grid = Grid(study.parse([str(path)]))
    cells = [Cell(name, 0) for name in grid.settings]
    resolved = [recipes.load(grid.recipe(cell.setting), grid.changes(cell)) for cell in cells]
    assert len({recipes.dump(recipe) for recipe in resolved}) == len(resolved), "two settings are the same run"
    if made := {each.path for each in grid.study.generated}:
        assert all(made & set(recipe.data.path.parents) for recipe in resolved)
    assert len({cell.name for cell in grid.cells}) == len(grid.cells)


def test_a_grid_with_pretraining_trains_each_before_what_starts_from_it() -> None:
    words = [
        str(ROOT / "tools" / "studies" / "fewshot.yaml"),
        "study.subsets.shots=[1]",
        "study.subsets.fractions=[1.0]",
    ]
    grid = Grid(study.parse([*words, "--settings", "scratch,dino_tuned,lafs_subset_tuned", "--out", "x"]))
    names = [cell.name for cell in grid.cells]
    assert len(names) == 3 * 3 + 3 + 2 * 3 * 3  # pretrainings, scratch, two starts
    for cell in grid.cells:
        changes = grid.changes(cell)
        if cell.setting == "dino_tuned":
            assert f'init_from.path="x/dino_p{cell.pretraining}"' in changes
            assert names.index(f"dino_p{cell.pretraining}") < names.index(cell.name)
        if cell.setting == "lafs_subset":
            assert f'method.landmark_weights="x/landmarks_p{cell.seed}"' in changes
            assert names.index(f"landmarks_p{cell.seed}") < names.index(cell.name)


@pytest.fixture
def small(tiny_faces: Path, tmp_path: Path) -> Path:
    recipe = recipe_file(
        tmp_path,
        tiny_faces / "train",
        backbone={
            "name": "vit_nano",
            "embedding_dim": 32,
            "image_size": 56,
            "overrides": {"dim": 32, "depth": 1, "heads": 2},
        },
        phases=[{"name": "all", "global_batch": 16, "micro_batches": 1}],
        schedule={"total": "4 steps", "warmup": "0 steps"},
        evaluation={"benchmarks": {"pairs": str(tiny_faces / "heldout.bin")}},
    )
    path = tmp_path / "margins.yaml"
    settings = {
        "low": {"classifier.margin.m": 0.1},
        "ends": {"optimizer.lr": 1e30},
        "high": {"classifier.margin": {"name": "arcface", "m": 0.5}},
    }
    values = {
        "recipe": str(recipe),
        "seeds": [0],
        "common": {"logging.every": 2},
        "settings": settings,
        "unseen": str(tiny_faces / "heldout"),
        "far": "1e-01",
    }
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def test_settings_are_run_once_and_stand_in_one_table(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    words = [str(small), "--out", str(out)]
    with pytest.raises(SystemExit, match=str(EXIT_ERROR)):  # one of them fails
        study.main(words)
    said = capfd.readouterr()
    assert "ends_seed0 failed at step" in said.err and "low_seed0" not in said.err.splitlines()[-1]
    table = json.loads((out / "study.json").read_text())
    assert [(row["setting"], row["seeds"]) for row in table] == [("low", [0]), ("high", [0])]
    figures = table[0]["figures"]
    assert {"loss", "pairs %", "TAR@FAR=1e-01 %", "kmeans B³F %"} <= figures.keys()
    final = json.loads((out / "low_seed0" / "evaluation" / "final.json").read_text())["benchmarks"]["pairs"]
    assert figures["pairs %"]["mean"] == pytest.approx(100 * final["accuracy"]) and figures["loss"]["std"] is None
    losses = [json.loads(line)["loss"] for line in (out / "low_seed0" / "metrics.jsonl").read_text().splitlines()]
    assert figures["loss"]["mean"] == pytest.approx(np.mean(losses[-1:])), "the mean of the last tenth"
    assert recipes.load(out / "high_seed0" / "recipe.yaml").classifier.margin.name == "arcface"

    before = (out / "low_seed0" / "events.jsonl").read_text()
    assert study.main([*words, "--settings", "low,high"]) == 0
    assert (out / "low_seed0" / "events.jsonl").read_text() == before, "a finished run is left alone"
    (out / "high_seed0" / "evaluation" / "final.json").unlink()  # as without benchmarks
    assert study.main([*words, "--seeds", "0,1", "--settings", "high", "--table", "checkpoint.every=2 steps"]) == 0
    only = json.loads((out / "study.json").read_text())[0]["figures"]
    assert "loss" in only and "pairs %" not in only
    assert "== " not in capfd.readouterr().out.split("┏")[-1], "--table runs nothing"


@pytest.mark.parametrize(
    ("change", "words", "key"),
    [
        ({}, ["--settings", "middle"], "middle"),
        ({"settings": {"typo": {"optimizer.rate": 1}}}, [], "optimizer.rate"),
        ({"setings": {}}, [], "setings"),
        ({"recipe": "nowhere.yaml"}, [], "nowhere.yaml"),
        ({}, ["study.sedes=[1]"], "sedes"),
        ({}, ["--table"], "study"),
    ],
)
def test_what_is_wrong_is_refused_before_the_first_run(
    small: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    change: dict[str, object],
    words: list[str],
    key: str,
) -> None:
    small.write_text(yaml.safe_dump(yaml.safe_load(small.read_text()) | change, sort_keys=False))
    with pytest.raises(SystemExit, match=str(EXIT_ERROR)):
        study.main([str(small), "--out", str(tmp_path / "study"), *words])
    found = capfd.readouterr()
    assert key in found.err and "== " not in found.out and len(found.err.strip().splitlines()) == 1


@pytest.fixture
def fewshot(tiny_faces: Path, tmp_path: Path) -> Path:
    """Two settings on subsets; the second starts from the first one's run."""
    small = {"dim": 16, "depth": 1, "heads": 2, "head_dim": 8, "mlp_dim": 32}
    recipe = recipe_file(
        tmp_path,
        tiny_faces / "train",
        data={"block": 8, "augmentation": "randaugment"},
        backbone={"name": "fvit_tiny", "embedding_dim": 16, "image_size": 56, "overrides": small},
        method={"name": "finetune"},
        phases=[{"name": "finetuning", "global_batch": 8, "micro_batches": 2}],
        schedule={"total": "2 steps", "warmup": "0 steps"},
        evaluation={"benchmarks": {"heldout": str(tiny_faces / "heldout.bin")}},
    )
    values = {
        "recipe": str(recipe),
        "seeds": [3],
        "subsets": {"dataset": str(tiny_faces / "train"), "fractions": [0.5], "shots": [2]},
        "settings": {
            "scratch": {"optimizer.layer_decay": None},
            "further": {"init_from.path": "{out}/50percent_2shot_scratch_seed{seed}", "optimizer.layer_decay": 0.58},
        },
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def test_subsets_and_a_setting_that_starts_from_another(fewshot: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid"
    words = [str(fewshot), "--out", str(out)]
    assert study.main(words) == 0
    folders = [out / f"50percent_2shot_{setting}_seed3" for setting in ("scratch", "further")]
    first, second = (yaml.safe_load((folder / "recipe.yaml").read_text()) for folder in folders)
    assert first["init_from"] is None and second["init_from"]["path"] == str(folders[0])
    assert first["data"]["path"] == second["data"]["path"]
    data = ShardDataset(first["data"]["path"])
    assert data.num_classes == 12 and len(data) == 24

    # the result of a second seed
    final = json.loads((folders[0] / "evaluation" / "final.json").read_text())
    accuracy = final["benchmarks"]["heldout"]["accuracy"]
    final["benchmarks"]["heldout"]["accuracy"] = accuracy + 0.02
    other = out / "50percent_2shot_scratch_seed4"
    shutil.copytree(folders[0], other)
    (other / "evaluation" / "final.json").write_text(json.dumps(final))
    assert study.main([*words, "study.subsets.shots=[1,2]", "--seeds", "3,4", "--table"]) == 0
    rows = json.loads((out / "study.json").read_text())
    row = next(row for row in rows if row["setting"] == "scratch")
    assert (row["fraction"], row["shots"], row["seeds"]) == (0.5, 2, [3, 4])
    figure = row["figures"]["heldout %"]
    assert figure["mean"] == pytest.approx(100 * accuracy + 1) and figure["std"] == pytest.approx(2**0.5)


def test_the_subsets_that_settings_name_are_written_once(small: Path, tiny_faces: Path, tmp_path: Path) -> None:
    path = tmp_path / "2shot.json"
    wanted = {str(path): {"dataset": str(tiny_faces / "train"), "fraction": 0.5, "shots": 2, "seed": 1}}
    small.write_text(yaml.safe_dump(yaml.safe_load(small.read_text()) | {"manifests": wanted}, sort_keys=False))
    grid = Grid(study.parse([str(small)]))
    grid.make_data()
    data, written = ShardDataset(path), path.stat().st_mtime_ns
    assert (data.num_classes, len(data)) == (12, 24)
    grid.make_data()
    assert path.stat().st_mtime_ns == written


def array(fewshot: Path, out: Path, capfd: pytest.CaptureFixture[str], *words: str) -> str:
    grid = ["study.subsets.shots=[1,2]", "--seeds", "0,1", "--settings", "scratch"]
    assert study.main([str(fewshot), "--out", str(out), *grid, "--submit", "--dry-run", *words]) == 0
    return capfd.readouterr().out


def test_slurm_array_in_dry_form(
    fewshot: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LVTRAIN_PARTITION", "gpu")
    monkeypatch.setenv("LVTRAIN_SBATCH", "--constraint=h200 --exclusive")
    out = tmp_path / "grid with space"
    script = array(fewshot, out, capfd, "--ranks", "4", "optimizer.lr=1e-4")
    assert not out.exists(), "nothing is written, nothing is submitted"
    expected = {"--array=0-3", "--partition=gpu", "--gpus-per-node=4", "--ntasks-per-node=4", "--constraint=h200"}
    assert expected | {"--requeue"} <= {line.removeprefix("#SBATCH ") for line in script.splitlines()}
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0

    # a task of the array means the same grid: a cell beyond its end is refused with the number of cells
    command = next(line for line in script.splitlines() if "SLURM_ARRAY_TASK_ID" in line and "--array" in line)
    task = command.split(" || ")[0].replace('--array "$SLURM_ARRAY_TASK_ID"', "--array 9")
    done = subprocess.run(["bash", "-c", task], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == EXIT_ERROR and "4 cells" in done.stderr


@pytest.mark.parametrize(("status", "expected", "requeued"), [(75, 0, True), (1, 1, False), (0, 0, False)])
def test_an_interrupted_task_goes_back_into_the_queue(
    fewshot: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], status: int, expected: int, requeued: bool
) -> None:
    """The script itself under bash, with a python that stops on request and a scontrol that notes its arguments."""
    script = array(fewshot, tmp_path / "grid", capfd).replace(sys.executable, str(tmp_path / "python"))
    noted = tmp_path / "noted"
    (tmp_path / "python").write_text(f"#!/bin/bash\nexit {status}\n")
    (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {noted}\n')
    for name in ("python", "scontrol"):
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_JOB_ID": "17"}
    done = subprocess.run(["bash"], input=script, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == expected
    assert (noted.read_text().split() if noted.exists() else []) == (["requeue", "17_2"] if requeued else [])
