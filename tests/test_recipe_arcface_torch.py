"""Somebody who writes arcface_torch's words: the keys are answered with ours, the names of networks are understood."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lvtrain.backbones.registry import BACKBONES
from lvtrain.errors import UserError
from lvtrain.recipe import arcface_torch
from lvtrain.recipe import files as recipes
from lvtrain.recipe.fields import all_keys

QUICKSTART = Path(recipes.__file__).parents[1] / "recipes" / "quickstart.yaml"
KEYS: dict[str, Any] = arcface_torch.table()["keys"]
# of configs/base.py, configs/ms1mv3_r50.py, configs/wf42m_pfc03_40epoch_8gpu_vit_b.py and train_v2.py
CONFIGURATION = tuple(
    re.findall(
        r"\w+",
        "margin_list network resume save_all_states output embedding_size sample_rate "
        "interclass_filtering_threshold fp16 batch_size optimizer lr momentum weight_decay verbose frequent "
        "dali gradient_acc seed num_workers wandb_key suffix_run_name using_wandb wandb_entity wandb_project "
        "wandb_log_all save_artifacts wandb_resume rec num_classes num_image num_epoch warmup_epoch "
        "val_targets dali_aug total_batch_size warmup_step total_step ",
    )
)


def test_the_table_has_every_key_of_their_configurations() -> None:
    assert set(CONFIGURATION) <= KEYS.keys()
    assert all(entry["how"] for entry in KEYS.values())


def test_the_page_for_who_moves_has_every_key_and_network() -> None:
    text = arcface_torch.PAGE.read_text()
    assert text == arcface_torch.page(), "run: python tools/recipe_reference.py"
    rows = {
        cells[1].strip(" `"): cells[2].strip(" `")
        for cells in (line.split("|") for line in text.splitlines() if line.startswith("| `"))
    }
    assert {key: entry.get("ours", "not needed") for key, entry in KEYS.items()}.items() <= rows.items()
    assert arcface_torch.table()["networks"].items() <= rows.items()


def test_every_key_of_ours_exists() -> None:
    ours = {key.dotted for key in all_keys()}
    sections = {dotted.rpartition(".")[0].removesuffix(".*") for dotted in ours}
    entries = [*KEYS.values(), *arcface_torch.table()["words"].values()]
    assert {entry["ours"] for entry in entries if "ours" in entry} <= ours | sections


@pytest.mark.parametrize("key", sorted(set(KEYS) - {"optimizer", "seed"}))
def test_their_key_is_answered_with_ours(key: str) -> None:
    with pytest.raises(UserError) as caught:
        recipes.load(QUICKSTART, [f"{key}=1"])
    message, ours = str(caught.value), KEYS[key].get("ours")
    assert f"unknown key {key!r}" in message and "\n" not in message
    assert ours.replace(".*.", ".0.") in message if ours else KEYS[key]["how"] in message


def test_a_whole_configuration_is_answered_briefly(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text("".join(f"{key}: 1\n" for key in CONFIGURATION))
    with pytest.raises(UserError) as caught:
        recipes.load(tmp_path / "theirs.yaml")
    message = str(caught.value)
    assert "tools/migrate_config.py" in message and "more mistakes" in message and len(message) < 1500


@pytest.mark.parametrize(("theirs", "ours"), arcface_torch.table()["networks"].items())
def test_their_networks_are_understood(theirs: str, ours: str) -> None:
    recipe = recipes.load(QUICKSTART, [f"backbone.name={theirs}"])
    assert recipe.backbone.name == ours
    assert recipes.load(QUICKSTART, [f"backbone={theirs}"]).backbone.name == ours
    assert ours in BACKBONES.names()


@pytest.mark.parametrize(
    ("override", "precision"), [("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("fp32", "float32")]
)
def test_short_names_of_number_formats(override: str, precision: str) -> None:
    assert recipes.load(QUICKSTART, [f"optimizer.precision={override}"]).optimizer.precision == precision


@pytest.mark.parametrize("name", ["fp16", "float16", "half"])
def test_float16_is_answered_with_the_reason(name: str) -> None:
    with pytest.raises(UserError, match="loss scaling"):
        recipes.load(QUICKSTART, [f"optimizer.precision={name}"])


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("lr=0.1", "optimizer.lr"),
        ("margin=arcface", "classifier.margin"),
        ("precision=bf16", "optimizer.precision"),
        ("epochs=20", "schedule.total"),
        ("workers=8", "data.threads"),
        ("pfc=0.1", "phases.0.sample_rate"),
        ("total=5 steps", "schedule.total"),
        ("benchmarks={}", "evaluation.benchmarks"),
        ("optimizer.warmup=5 steps", "schedule.warmup"),
        ("method=arcface", "classifier.margin=arcface"),
        ("method.name=cosface", "classifier.margin=cosface"),
    ],
)
def test_a_key_in_another_place_is_named(override: str, answer: str) -> None:
    with pytest.raises(UserError) as caught:
        recipes.load(QUICKSTART, [override])
    assert answer in str(caught.value)
