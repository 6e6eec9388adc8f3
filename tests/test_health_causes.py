"""The health check: nothing is named in published recipes and healthy signs, and each fault is named by its signs."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from lvtrain.health.causes import CAUSES
from lvtrain.health.plateau import Plateau
from lvtrain.health.rules import RULES, Signs, name_causes
from lvtrain.health.start import check_recipe
from lvtrain.recipe import files as recipes
from lvtrain.recipe.sections import Recipe
from tests.conftest import ROOT
from tests.runs import TINY
from tools.trial import PRELOADED

RECIPES = sorted(path.name for path in (ROOT / "lvtrain" / "recipes").glob("*.yaml"))

# recorded: seed 1 of tools/health.py without a fault, step 100, in round figures
RANK: dict[str, Any] = {
    "images": 640, "constant": 0, "grey": 56, "copies": 0, "lowest": -1.0, "highest": 1.0,
    "files": 6688, "file_copies": 0, "file_copies_across": 0, "seen": 640, "misplaced": 0, "mislabelled": 0,
    "redder": 26.0, "coloured": 73, "likeness": 1.0, "contrast": 1.0, "swapped": -1.71,
    "moved": 1.0, "stride": 0.26, "shrink": 0.01, "dead": 0.0, "own_norm": 87.0, "grad_norm": 69.0, "pull": 60.0,
    "rows_moved": 1.0, "own": [0.62] * 64, "other": [0.28] * 64, "apart": 0.02, "within": 0.52,
}  # fmt: skip
TOTAL: dict[str, float] = {
    "same_pairs": 1300, "same_pixels": 300, "same_pixels_square": 330,
    "other_pairs": 6100, "other_pixels": -150, "other_pixels_square": 1370,
}  # fmt: skip
FACTS = {
    "scale": 64.0, "optimizer": "adamw", "weight_decay": 0.1, "rate": 1e-3, "layer_decay": None, "sample_rate": 1.0,
    "grey": 0.0, "keeps_identity": True, "frozen": False, "weighs": True, "images": 1536, "global_batch": 64,
}  # fmt: skip

# what a fault changes in these signs, as the bench shows it
FAULTS: dict[str, dict[str, Any]] = {
    "normalisation": {"lowest": 0.0, "highest": 255.0},
    "bgr": {"swapped": 1.7},
    "constant": {"constant": 320},
    "colourless": {"grey": 350},
    "copies": {"copies": 320},
    "duplicates": {"file_copies_across": 300},
    "part": {"misplaced": 320},
    "augmentation": {"likeness": 0.02},
    "labels": {"mislabelled": 0.9},
    "split": {"own": [0.65] * 64, "other": [0.58] * 30 + [0.28] * 34},
    "merged": {"apart": 0.2},
    "collapse": {"own": [0.97] * 64, "other": [0.97] * 64},
    "rate high": {"stride": 8.0},
    "rate low": {"stride": 0.003},
    "decay": {"shrink": 10.0},
    "gradient": {"grad_norm": 138.0},
    "frozen": {"moved": 0.1},
    "dead": {"dead": 0.7},
    "rows": {"rows_moved": 0.0},
}


def signs(first: dict[str, Any] | None = None, total: dict[str, Any] | None = None, **facts: Any) -> Signs:
    return Signs([RANK | (first or {}), dict(RANK)], TOTAL | (total or {}), 10, 100, 4.2, FACTS | facts)


@pytest.mark.parametrize("name", RECIPES)
def test_published_recipes_show_no_fault(name: str) -> None:
    recipe = recipes.load(ROOT / "lvtrain" / "recipes" / name)
    sizes = {"classes": recipe.data.num_classes or 2_000, "images": recipe.data.num_samples or 12_000}
    assert check_recipe(recipe, **sizes, has_attention=True) == []


def test_healthy_signs_name_nothing() -> None:
    assert name_causes(signs()) == []
    not_measured = Signs([{}], dict.fromkeys(TOTAL, 0.0), 10, 10, 0.1, FACTS)
    assert name_causes(not_measured) == []


@pytest.mark.parametrize("cause", RULES)
def test_each_sign_names_its_cause(cause: str) -> None:
    both = Signs([RANK | FAULTS[cause], RANK | FAULTS[cause]], TOTAL, 10, 100, 4.2, FACTS)
    (found,) = name_causes(both)
    assert found.cause == cause and found.is_warning


def test_labels_that_fit_no_image_need_enough_pairs() -> None:
    shuffled = {"same_pixels": -25.0}
    assert [found.cause for found in name_causes(signs(total=shuffled))] == ["labels"]
    few = {"same_pairs": 150, "same_pixels": -3.0, "same_pixels_square": 38.0}
    assert name_causes(signs(total=few)) == []
    assert name_causes(signs(total=shuffled, keeps_identity=False)) == []


def changed(**sections: Any) -> Recipe:
    values = {**TINY, "data": {"path": "none"}, **sections}
    return recipes.resolve(values)


@pytest.mark.parametrize(
    ("cause", "sections"),
    [
        ("rate high", {"optimizer": {"lr": 0.03}}),
        ("rate low", {"optimizer": {"lr": 1e-5}}),
        ("decay", {"optimizer": {"weight_decay": 10}}),
        ("warm-up", {"schedule": {"total": "12 steps"}}),
        ("ema", {"ema": {"decay": 0.9999}}),
        ("scale", {"classifier": {"margin": {"name": "cosface", "scale": 4}}}),
    ],
)
def test_a_recipe_shows_its_fault(cause: str, sections: dict[str, Any]) -> None:
    found = check_recipe(changed(**sections), classes=500, images=12_000, has_attention=True)
    assert [each.cause for each in found] == [cause]


def test_too_few_sampled_classes() -> None:
    def causes(classes: int) -> list[str]:
        found = check_recipe(changed(), classes=classes, images=12_000, has_attention=True)
        return [each.cause for each in found]

    assert causes(classes=24) == ["sampling"]  # 0.4 x 24 are fewer than the 12 identities of a batch of 16
    assert causes(classes=500) == []


def row(step: int, loss: float, cos2: float = 0.002, across: float = 0.97) -> dict[str, Any]:
    return {"step": step, "epoch": step / 1728, "loss": loss, "cos2": cos2, "batch_cosine": across}


def causes_of(rows: list[dict[str, Any]], warmup: str) -> list[str]:
    followed = Plateau(changed(schedule={"total": "40 epochs", "warmup": warmup}, backbone={"embedding_dim": 512}))
    found = [each for one in rows for each in followed.add(one, step=one["step"], epoch=one["epoch"])]
    return list(dict.fromkeys(each.cause for each in found if each.is_warning)) or sorted({e.cause for e in found})


def test_the_plateau_of_the_published_vit_l_is_called_a_plateau() -> None:
    """Its log: 38.8 to 39.3 from step 250 to 1,200, below 38 at 1,580, below 30 at 2,940, with 4 epochs of warm-up."""
    flat = [row(step, 39.3 - 0.5 * step / 1200) for step in range(250, 1201, 50)]
    falls = [row(step, 38.8 - (step - 1200) / 200, 0.01, 0.5) for step in range(1250, 2941, 50)]
    assert causes_of(flat + falls, "4 epochs") == ["plateau"]


def test_a_run_that_is_stuck_after_its_warmup_and_an_epoch_is_not_learning() -> None:
    stuck = [row(step, 38.5 + 0.01 * (step % 3)) for step in range(50, 6000, 50)]
    assert causes_of(stuck, "1 epochs") == ["not learning"]
    assert causes_of([one for one in stuck if one["epoch"] < 2], "1 epochs") == ["plateau"]
    still_falling = [row(step, 39.0 - step / 2000) for step in range(50, 6000, 50)]
    assert causes_of(still_falling, "1 epochs") == ["plateau"]
    chance = [row(step, 42.5, 0.002, 0.0) for step in range(50, 6000, 50)]
    assert causes_of(chance, "1 epochs") == ["not learning"]
    learns = [row(step, 42.5 - step / 200, 0.2, 0.0) for step in range(50, 6000, 50)]
    assert causes_of(learns, "1 epochs") == []


def test_every_cause_has_its_entry_in_the_troubleshooting_page() -> None:
    page = (ROOT / "lvtrain" / "training" / "troubleshooting.md").read_text()
    assert [cause for cause in CAUSES if f"**{cause}**" not in page] == []


def _train(folder: str, answers: Any) -> None:
    from tools.health import RECIPE, Run, make_data, train
    from tools.health_runs.faults import FAULTS

    for name in ("BGR from the loader", "class centres not updated", ""):
        fault = FAULTS.get(name)
        data = make_data(Path(folder) / "data", 3, "plain")
        recipe = RECIPE | {"schedule": {"total": "30 steps", "warmup": "5 steps"}}
        run = Run(name, 3, recipe, data, expected=fault.causes if fault else ())
        train(run, Path(folder) / (name.replace(" ", "_") or "healthy"), fault.change if fault else None)
        answers.put((name, run.named, run.error))


def test_faults_of_small_real_trainings_are_named(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    answers = context.Queue()
    process = context.Process(target=_train, args=(str(tmp_path), answers))
    process.start()
    found = {name: (named, error) for name, named, error in (answers.get(timeout=300) for _ in range(3))}
    process.join()
    assert found["BGR from the loader"] == ({"bgr": 10}, "")
    assert found["class centres not updated"] == ({"rows": 10}, "")
    assert found[""] == ({}, "")
