"""A study: its published files, two real settings over one seed, a failing one named, and what is refused before the first run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from lvtrain.errors import EXIT_ERROR
from lvtrain.recipe import files as recipes
from tests.conftest import ROOT
from tests.runs import recipe_file
from tools import study


@pytest.mark.parametrize("path", sorted(study.STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_published_studies_change_what_they_say(path: Path) -> None:
    found = study.read(path)
    recipe = ROOT / found.recipe
    resolved = {name: recipes.dump(recipes.load(recipe, found.overrides(name))) for name in found.settings}
    assert len(set(resolved.values())) == len(resolved), "two settings are the same run"
    if found.generated:
        paths = [recipes.load(recipe, found.overrides(name)).data.path for name in found.settings]
        assert all(found.generated.path in path.parents for path in [*paths, found.unseen or paths[0]])


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
        "ends": {"optimizer.lr": 1e30, "safety.max_nonfinite": 1},
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
    assert study.main(words) == EXIT_ERROR, "one of them fails"
    said = capfd.readouterr()
    assert "ends_seed0 failed at step" in said.err and "low_seed0" not in said.err.splitlines()[-1]
    table = json.loads((out / "study.json").read_text())
    assert list(table) == ["low", "high"] and all(row["seeds"] == [0] for row in table.values())
    figures = table["low"]["figures"]
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
    only = json.loads((out / "study.json").read_text())["high"]["figures"]
    assert "loss" in only and "pairs %" not in only
    assert "== " not in capfd.readouterr().out.split("┏")[-1], "--table runs nothing"


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        ({}, ["--settings", "middle"], "--settings middle: the study has low, ends, high"),
        ({"settings": {"typo": {"optimizer.rate": 1}}}, [], "optimizer.rate"),
        ({"setings": {}}, [], "setings: Extra inputs are not permitted"),
        ({"recipe": "nowhere.yaml"}, [], "recipe nowhere.yaml does not exist"),
        ({}, ["--table"], "nothing is finished under"),
    ],
)
def test_what_is_wrong_is_told_before_the_first_run(
    small: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    change: dict[str, object],
    words: list[str],
    said: str,
) -> None:
    small.write_text(yaml.safe_dump(yaml.safe_load(small.read_text()) | change, sort_keys=False))
    assert study.main([str(small), "--out", str(tmp_path / "study"), *words]) == EXIT_ERROR
    found = capfd.readouterr()
    assert said in found.err and "== " not in found.out and len(found.err.strip().splitlines()) == 1
