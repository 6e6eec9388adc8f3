"""LAFS's few-shot grid: its cells, a real one run and not run again, the Slurm array in dry form, and the table's form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lvtrain.data import ShardDataset
from lvtrain.errors import EXIT_ERROR
from tests.conftest import ROOT
from tests.runs import recipe_file
from tools import fewshot

SMALL = {"dim": 16, "depth": 1, "heads": 2, "head_dim": 8, "mlp_dim": 32}
CELLS = ("--fractions", "0.5", "--shots", "1", "2", "--seeds", "0", "1")


@pytest.fixture
def recipe(tiny_faces: Path, tmp_path: Path) -> Path:
    return recipe_file(
        tmp_path,
        tiny_faces / "train",
        data={"block": 8, "augmentation": "randaugment"},
        backbone={"name": "fvit_tiny", "embedding_dim": 16, "image_size": 56, "overrides": SMALL},
        method={"name": "finetune"},
        phases=[{"name": "finetuning", "global_batch": 8, "micro_batches": 2}],
        optimizer={"layer_decay": 0.58},
        schedule={"total": "2 steps", "warmup": "0 steps"},
        evaluation={"benchmarks": {"heldout": str(tiny_faces / "heldout.bin")}},
    )


def test_a_cell_is_run_once_and_the_table_has_the_papers_form(
    recipe: Path, tiny_faces: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grid"
    words = [str(tiny_faces / "train"), "--start", f"scratch={recipe}", "--out", str(out)]
    one = [*words, "--fractions", "0.5", "--shots", "2", "--seeds", "3"]
    assert fewshot.main(one) == 0
    folder = out / "50percent_2shot_scratch_seed3"
    resolved = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert resolved["optimizer"]["layer_decay"] is None and resolved["init_from"] is None, (
        "from scratch no layer-wise decay"
    )
    data = ShardDataset(resolved["data"]["path"])
    assert data.num_classes == 12 and len(data) == 24

    before = (folder / "events.jsonl").read_text()
    assert fewshot.main(one) == 0 and (folder / "events.jsonl").read_text() == before, "a finished cell is left alone"

    # a second seed's result beside it
    final = json.loads((folder / "evaluation" / "final.json").read_text())
    second = out / "50percent_2shot_scratch_seed4" / "evaluation"
    second.mkdir(parents=True)
    accuracy = final["benchmarks"]["heldout"]["accuracy"]
    final["benchmarks"]["heldout"]["accuracy"] = accuracy + 0.02
    (second / "final.json").write_text(json.dumps(final))
    capfd.readouterr()
    assert fewshot.main([*words, "--fractions", "0.5", "--shots", "1", "2", "--seeds", "3", "4", "--table"]) == 0
    printed = capfd.readouterr().out
    header = next(line for line in printed.splitlines() if "Data amount" in line)
    assert [name.strip() for name in header.strip("┃ ").split("┃")] == [
        "Data amount", "Pretrain method", "Backbone", "1 shot", "2 shot",
    ]  # fmt: skip
    assert f"{100 * accuracy + 1:.2f} ± 1.41" in printed and "50%" in printed and "fvit_tiny" in printed
    (entry,) = json.loads((out / "table.json").read_text())["heldout"]
    assert entry["shots"] == 2 and len(entry["accuracies"]) == 2


def test_slurm_array_in_dry_form(
    recipe: Path, tiny_faces: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LVTRAIN_PARTITION", "gpu")
    monkeypatch.setenv("LVTRAIN_SBATCH", "--constraint=h200 --exclusive")
    words = [
        str(tiny_faces / "train"),
        "--start",
        f"scratch={recipe}",
        "--out",
        str(tmp_path / "grid with space"),
        *CELLS,
    ]
    assert fewshot.main([*words, "--ranks", "4", "--submit", "--dry-run", "optimizer.lr=1e-4"]) == 0
    script = capfd.readouterr().out
    assert not (tmp_path / "grid with space").exists(), "nothing written, nothing submitted"
    for line in (
        "--array=0-3",
        "--partition=gpu",
        "--gpus-per-node=4",
        "--ntasks-per-node=4",
        "--constraint=h200",
        "--requeue",
    ):
        assert f"#SBATCH {line}" in script, line
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0

    # what a task of the array runs, with --table added so that it is read but not run, names the same grid
    command = next(line for line in script.splitlines() if "SLURM_ARRAY_TASK_ID" in line and "--array" in line)
    task = command.split(" || ")[0].replace('--array "$SLURM_ARRAY_TASK_ID"', "--array 9")
    done = subprocess.run(["bash", "-c", task], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == EXIT_ERROR and "there are 4 cells, 0 to 3" in done.stderr


def test_an_interrupted_task_is_put_back_in_the_queue(recipe: Path, tiny_faces: Path, tmp_path: Path) -> None:
    """The script itself, under bash, with a python that stops on request and a scontrol that notes what it is told."""
    options = fewshot.parse([str(tiny_faces / "train"), "--start", f"scratch={recipe}", "--out", str(tmp_path), *CELLS])
    script = fewshot.array_script(options, ["data"], 4).replace(sys.executable, str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/bash\nexit ${STATUS}\n")
    (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/told\n')
    for name in ("python", "scontrol"):
        (tmp_path / name).chmod(0o755)
    for status, expected in ((75, 0), (1, 1), (0, 0)):
        environment = {
            "PATH": f"{tmp_path}:/usr/bin:/bin", "STATUS": str(status), "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_JOB_ID": "70",
        }  # fmt: skip
        assert subprocess.run(["bash", "-c", script], env=environment).returncode == expected
    assert (tmp_path / "told").read_text() == "requeue 70_2\n"


def test_wrong_words_are_told(recipe: Path, tiny_faces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fewshot.main([str(tiny_faces / "train"), "--start", "dino=nowhere.yaml"]) == EXIT_ERROR
    assert "NAME=RECIPE.yaml" in capsys.readouterr().err
    assert fewshot.main([str(tiny_faces / "train"), "--start", f"dino={recipe}:nowhere"]) == EXIT_ERROR
    assert "pretrain it first" in capsys.readouterr().err
