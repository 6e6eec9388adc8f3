"""An IResNet with SGD through the front door: killed and resumed with the same bits, and resumed at a lower rate."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import events, metrics, output, recipe_file, run
from tools.trial import contents, end, start

STEPS, BATCH = 12, 24  # an epoch of 240 images ends at step 10
BACKBONE = {"name": "iresnet18", "embedding_dim": 32, "image_size": 32, "overrides": {"layers": [1, 1, 1, 1]}}
SGD = {"name": "sgd", "lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "decay_norms": True}


def make(folder: Path, faces: Path) -> Path:
    return recipe_file(
        folder,
        faces / "train",
        backbone=BACKBONE,
        method={"name": "classification"},
        phases=[{"name": "train", "global_batch": BATCH, "micro_batches": 4}],
        optimizer=SGD,
        classifier={"margin": {"name": "arcface", "m": 0.5}, "optimizer": {"name": "sgd"}},
        schedule={"total": f"{STEPS} steps", "warmup": "2 steps"},
        checkpoint={"every": "4 steps"},
    )


def blow(recipe: Path, zero: int, fault: str, *more: str) -> list[int | None]:
    arguments = ["--recipe", str(recipe), "--ds_config", f"ds_configs/zero{zero}.json", *more]
    return end(start(2, arguments, recipe.parent / "log.txt", {"LVTRAIN_FAULT": fault}), 500.0)


def folder_of(recipe: Path) -> Path:
    return recipe.parent / "runs" / "tiny"


@pytest.fixture(scope="module")
def peaceful(tiny_faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = make(tmp_path_factory.mktemp("peaceful"), tiny_faces)
    assert run(recipe, ranks=2, zero=1) == 0, output(recipe)
    return folder_of(recipe)


def test_a_killed_run_ends_with_the_same_bits(peaceful: Path, tiny_faces: Path, tmp_path: Path) -> None:
    recipe = make(tmp_path, tiny_faces)
    assert -9 in blow(recipe, 1, "loop.step:1:6:sigkill")
    assert run(recipe, ranks=2, zero=1) == 0, output(recipe)
    ours, theirs = contents(folder_of(recipe)), contents(peaceful)
    assert any("momentum_buffer" in name for name in theirs) and not any("adam" in name for name in theirs)
    assert not [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]


def test_a_resume_at_a_lower_rate_on_other_ranks_is_recorded(peaceful: Path, tiny_faces: Path, tmp_path: Path) -> None:
    """2 ranks, ZeRO-1, then 4 ranks, ZeRO-3, at a quarter of the rate: with the step and the start from which it counts."""
    recipe = make(tmp_path, tiny_faces)
    assert blow(recipe, 1, "loop.step:0:5:sigterm") == [75, 75], output(recipe)
    assert run(recipe, "optimizer.lr=0.005", ranks=4, zero=3) == 0, output(recipe)
    (changed,) = events(folder_of(recipe), "recipe_changed")
    (resume,) = events(folder_of(recipe), "resume")
    assert changed["change"].startswith("optimizer.lr") and changed["attempt"] == resume["attempt"] == 2
    assert changed["step"] == resume["step"] and 5 <= resume["step"] < 8
    before, now = metrics(peaceful), metrics(folder_of(recipe))
    assert [row["step"] for row in now] == list(range(1, STEPS + 1))
    for row, reference in zip(now, before):
        factor = 0.25 if row["step"] > resume["step"] else 1.0
        assert row["lr"] == pytest.approx(factor * reference["lr"]), row["step"]
        if row["step"] <= resume["step"] + 1:  # the first loss after the resume does not know of the rate yet
            assert row["loss"] == pytest.approx(reference["loss"], rel=1e-6), row["step"]
    first = events(folder_of(recipe), "epoch")[0]
    assert first["exact"] and first["distinct"] == 240
