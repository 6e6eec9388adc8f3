"""Mistakes a user makes, at the front door: one clear line, an exit status that is not 0, no traceback, nothing started."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.runs import recipe_file


def attempt(recipe: Path, *arguments: str, ds_config: str = "ds_configs/zero2.json", **environment: str) -> str:
    import os

    command = [sys.executable, "lvtrain/main.py", "--recipe", str(recipe), "--ds_config", ds_config, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("lvtrain: error:")]
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.strip().splitlines()[-1] == lines[0], "the error is the last line"
    return lines[0]


@pytest.fixture
def copy(tiny_faces: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_faces / "train", tmp_path / "train")
    return tmp_path / "train"


def test_typo_in_a_recipe_key(tiny_faces: Path, tmp_path: Path) -> None:
    assert "did you mean 'optimizer'?" in attempt(recipe_file(tmp_path, tiny_faces / "train"), "optimzer.lr=1")


def test_num_classes_smaller_than_a_label(tiny_faces: Path, tmp_path: Path) -> None:
    line = attempt(recipe_file(tmp_path, tiny_faces / "train"), "data.num_classes=10")
    assert "num_classes" in line and "24" in line


def test_no_dataset(tmp_path: Path) -> None:
    assert "dataset.json" in attempt(recipe_file(tmp_path, tmp_path / "nowhere"))


def test_missing_shard_is_named(copy: Path, tmp_path: Path) -> None:
    shard = sorted(copy.rglob("*.tar"))[0]
    shard.unlink()
    assert shard.name in attempt(recipe_file(tmp_path, copy))


def test_truncated_tar_is_named(copy: Path, tmp_path: Path) -> None:
    shard = sorted(copy.rglob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:-5000])
    assert shard.name in attempt(recipe_file(tmp_path, copy))


def test_more_ranks_than_classes(tiny_faces: Path, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, tiny_faces / "train")
    overrides = [
        f"phases.{i}.{key}={value}" for i in range(3) for key, value in (("global_batch", 32), ("virtual_batches", 32))
    ]
    line = attempt(
        recipe, *overrides, RANK="0", WORLD_SIZE="32", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1"
    )
    assert "32 ranks but only 24 classes" in line


def test_ranks_that_do_not_divide_v(tiny_faces: Path, tmp_path: Path) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    assert "start 1, 2, 4 ranks" in attempt(recipe_file(tmp_path, tiny_faces / "train"), **variables)


def test_json_that_contradicts_the_recipe(tiny_faces: Path, tmp_path: Path) -> None:
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 2}, "train_batch_size": 99}))
    assert "train_batch_size" in attempt(recipe_file(tmp_path, tiny_faces / "train"), ds_config=str(config))


def test_benchmark_that_is_not_there(tiny_faces: Path, tmp_path: Path) -> None:
    assert "lfw.bin" in attempt(
        recipe_file(tmp_path, tiny_faces / "train"), "evaluation.benchmarks.lfw=nowhere/lfw.bin"
    )


def test_unknown_phase(tiny_faces: Path, tmp_path: Path) -> None:
    assert "alignment, stabilisation, refinement" in attempt(
        recipe_file(tmp_path, tiny_faces / "train"), "--phase", "refine"
    )


def test_must_resume_from_nothing(tiny_faces: Path, tmp_path: Path) -> None:
    assert "holds no checkpoint" in attempt(recipe_file(tmp_path, tiny_faces / "train"), "checkpoint.resume=must")
