"""Recipes as plans: the published ones, the tool, and the number of micro-batches that fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import typer.testing

from lvtrain.backbones import create_backbone
from lvtrain.errors import UserError
from lvtrain.planning import measure_network, plan_phases
from lvtrain.recipe import files as recipes
from tools import plan as tool

RECIPES = Path(__file__).parent.parent / "lvtrain" / "recipes"
PHASES = ["alignment", "stabilisation", "refinement"]


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(tool.main)
    return typer.testing.CliRunner().invoke(app, arguments)


def answer(*arguments: str) -> str:
    good = invoke(*arguments)
    assert good.exit_code == 0, good.output
    return good.stdout


def test_published_recipes_are_planned() -> None:
    recipe = recipes.load(RECIPES / "pco_vitb_glint360k.yaml")
    plans = plan_phases(recipe, ranks=8)
    assert list(plans) == [phase.name for phase in recipe.phases] and all(found.fits for found in plans.values())
    first, second = list(plans.values())[:2]
    assert "feature expectations" in second.memory and "feature expectations" not in first.memory
    with pytest.raises(UserError, match=r"cannot be split over 7 ranks; use one of 1, 2, 4, 8"):
        plan_phases(recipe, ranks=7)


def test_self_distillation_is_planned() -> None:
    """The published recipes: 64 images a micro-batch, 100K prototypes, ten views; LAFS's landmark CNN sees ten more, its student 36 of 196 patches."""
    dino, lafs = (
        plan_phases(recipes.load(RECIPES / f"{name}_webface1shot.yaml"), ranks=8)["pretraining"]
        for name in ("dino_fvitb", "lafs_part_fvitb")
    )
    head = 768 * 2048 + 2048 * 2048 + 2048 * 256 + 256 * 100_000
    assert (
        dino.setup.network.parameters
        == measure_network("fvit_base", lambda: create_backbone("fvit_base", embedding_dim=768)).parameters + head
    )
    assert dino.memory["teacher"] == dino.memory["weights"] == 4 * dino.setup.network.parameters
    assert dino.memory["prototype logits"] == lafs.memory["prototype logits"] == 3.4 * 4 * 64 * 10 * 100_000
    assert dino.memory["images"] == pytest.approx(2 * 64 * 4 * 3 * (2 * 112**2 + 8 * 48**2))
    assert lafs.memory["images"] == pytest.approx(2 * 64 * 4 * 3 * 20 * 112**2)
    assert dino.memory["activations"] == pytest.approx(64 * dino.setup.network.saved * (2 + 8 * (48 / 112) ** 2))
    assert lafs.memory["activations"] == pytest.approx(64 * lafs.setup.network.saved * 10 * 36 / 196)


def test_the_tool_answers_on_one_screen(tiny_faces: Path) -> None:
    """Days, GPU-hours and cost first; every part with --detail; the same figures as JSON."""
    quickstart = [str(RECIPES / "quickstart.yaml"), "--ranks", "2", f"data.path={tiny_faces / 'train'}"]
    lines = answer(*quickstart, "--price-per-gpu-hour", "2.5").splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 100
    assert "240 images" in lines[0] and [line.split()[0] for line in lines[3:7]] == [*PHASES, "whole"]
    assert "memory a rank" in answer(*quickstart, "--detail")

    found = json.loads(answer(*quickstart, "--price-per-gpu-hour", "2.5", "--json"))
    assert [name for name in found if name != "whole run"] == PHASES
    whole = found.pop("whole run")
    assert whole["images"] == sum(phase["images"] for phase in found.values()) == 700 * 128  # 700 steps
    for phase in found.values():
        assert phase["gpu_hours"] * 3600 == pytest.approx(phase["images"] / phase["images_per_second"])
        assert phase["days"] == pytest.approx(phase["gpu_hours"] / 2 / 24)
    assert whole["gpu_hours"] == pytest.approx(sum(phase["gpu_hours"] for phase in found.values()))
    assert whole["cost"] == pytest.approx(2.5 * whole["gpu_hours"]) and whole["fits"]


@pytest.mark.parametrize("name", ["pco_vith_webface42m", "cluster_r100_ms1mv3"])
def test_published_recipes_fit_the_screen(name: str) -> None:
    lines = answer(str(RECIPES / f"{name}.yaml"), "--price-per-gpu-hour", "1", "--gpu", "rtx4090").splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 100
    assert any(line.startswith("DOES NOT FIT") for line in lines) == (name == "pco_vith_webface42m")


def test_the_tool_refuses(tmp_path: Path) -> None:
    quickstart = [str(RECIPES / "quickstart.yaml"), f"data.path={tmp_path / 'absent'}"]
    numbers = ["data.num_classes=500", "data.num_samples=12000"]
    for arguments, named in (
        (["--ds_config", "nowhere.json", *numbers], "nowhere.json does not exist"),
        (["--gpu", "h300", *numbers], "h100, h200, b200"),
        (["data.num_classes=500"], "data.num_samples=N"),
    ):
        bad = invoke(*quickstart, *arguments)
        assert bad.exit_code == 2 and named in bad.output


@pytest.mark.parametrize("name", ["resnet50", "convnext_tiny"])
def test_parameters_are_timms(name: str) -> None:
    backbone = measure_network(name, lambda: create_backbone(f"timm:{name}"))
    bare = timm.create_model(name, num_classes=0)
    trained = sum(parameter.numel() for parameter in bare.parameters())
    assert backbone.parameters == trained + 512 * bare.num_features + 2 * 512  # a linear layer and a BatchNorm
