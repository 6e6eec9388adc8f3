"""Renamed and removed keys: answered with today's name, and translated where an old run folder is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lvtrain.errors import UserError
from lvtrain.recipe import files as recipes
from lvtrain.recipe import old_keys
from lvtrain.training.earlier_starts import changes

QUICKSTART = Path(recipes.__file__).parents[1] / "recipes" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("phases.1.virtual_batches=4", "phases.1.micro_batches"),
        ("init_from={path: x, head: means}", "init_from.classifier"),
    ],
)
def test_an_old_key_is_answered_with_the_new_one(override: str, name: str) -> None:
    with pytest.raises(UserError) as caught:
        recipes.load(QUICKSTART, [override])
    assert f"it is called {name} now" in str(caught.value) and "\n" not in str(caught.value)


def test_an_old_run_folder_is_the_same_recipe(tmp_path: Path) -> None:
    recipe = recipes.load(QUICKSTART, [f"runs={tmp_path}", "init_from={path: x, classifier: means}"])
    values = yaml.safe_load(recipes.dump(recipe))
    for phase in values["phases"]:
        phase["virtual_batches"] = phase.pop("micro_batches")
    values["init_from"]["head"] = values["init_from"].pop("classifier")
    folder = recipe.run_folder
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    for name in ("metrics.jsonl", "run.json"):
        (folder / name).write_text("{}")
    assert changes(folder, recipe, "") == []
    with pytest.raises(UserError, match=r"phases\.2\.micro_batches: 2 -> 4"):
        changes(
            folder,
            recipes.load(
                QUICKSTART, [f"runs={tmp_path}", "init_from={path: x, classifier: means}", "phases.2.micro_batches=4"]
            ),
            "",
        )


@pytest.mark.parametrize("method", ["pco", "classification"])
def test_an_old_run_folder_had_an_expectation_for_every_method(method: str, tmp_path: Path) -> None:
    overrides = [f"runs={tmp_path}", f"method={method}", "phases=[{name: all, global_batch: 8}]"]
    recipe = recipes.load(QUICKSTART, overrides)
    values = yaml.safe_load(recipes.dump(recipe))
    values["phases"][0]["expectation"] = "off"
    folder = recipe.run_folder
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    for name in ("metrics.jsonl", "run.json"):
        (folder / name).write_text("{}")
    assert changes(folder, recipe, "") == []


def test_removed_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    removed: dict[str, Any] = {
        "classifier.turbo": (False, "it never helped"),
        "phases.*.note": (None, "write a comment"),
    }
    monkeypatch.setattr(old_keys, "REMOVED_KEYS", removed)
    with pytest.raises(UserError, match=r"phases\.0\.note.*write a comment"):
        recipes.load(QUICKSTART, ["phases.0.note=x"])
    old = {"classifier": {"turbo": False}, "phases": [{"note": None, "name": "a"}, {"note": "x"}]}
    assert old_keys.translate(old) == {"classifier": {}, "phases": [{"name": "a"}, {"note": "x"}]}
    assert old_keys.translate({"classifier": {"turbo": True}}) == {"classifier": {"turbo": True}}


def test_a_function_moves_a_value_to_several_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"size": lambda value: {"image.width": value, "image.height": value}}
    monkeypatch.setattr(old_keys, "OLD_KEYS", keys)
    assert old_keys.translate({"size": 3, "image": {"height": 4}}) == {"image": {"width": 3, "height": 4}}
    with pytest.raises(UserError, match=r"image\.width, image\.height"):
        recipes.load(QUICKSTART, ["size=3"])


@pytest.mark.parametrize("key", ["precision", "kernel", "gather", "keep_mb"])
def test_the_classifiers_old_numerics_are_answered(key: str) -> None:
    with pytest.raises(UserError) as caught:
        recipes.load(QUICKSTART, [f"classifier.{key}=1"])
    assert f"'classifier.{key}'" in str(caught.value) and f"classifier.numerics.{key}" in str(caught.value)


@pytest.mark.parametrize("name", ["cosface", "arcface", "combined", "adaface"])
def test_an_old_run_folder_had_every_key_for_every_margin(name: str, tmp_path: Path) -> None:
    recipe = recipes.load(QUICKSTART, [f"runs={tmp_path}", f"classifier.margin={name}", "classifier.numerics=fast"])
    values = yaml.safe_load(recipes.dump(recipe))
    values["classifier"] = {
        "margin": {
            "name": name,
            "scale": 64.0,
            "m": None,
            "m1": 1.0,
            "m2": 0.0,
            "m3": 0.0,
            "straight_through": False,
            "filter_threshold": None,
            "warmup": "0 steps",
        },
        "precision": "half",
        "kernel": "torch",
        "gather": "float32",
        "chunk": None,
        "keep_mb": 2048.0,
        "optimizer": {
            "name": "adamw",
            "mode": "dense",
            "lr": None,
            "weight_decay": None,
            "momentum": 0.9,
            "moments": "float32",
            "kernel": "torch",
            "in_backward": False,
        },
    }
    folder = recipe.run_folder
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    for file in ("metrics.jsonl", "run.json"):
        (folder / file).write_text("{}")
    assert changes(folder, recipe, "") == []
    values["classifier"]["margin"]["m1"] = 1.2
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"classifier\.margin\.m1: 1\.2"):
        changes(folder, recipe, "")
