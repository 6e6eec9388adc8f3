"""The baselines hold the values of arcface_torch's and CVLface's configurations, and their reference curves are consistent."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lvtrain.recipe import files as recipes
from lvtrain.recipe.sections import Recipe

FOLDER = Path(recipes.__file__).parents[1] / "recipes"

# read from the configurations: identities, images
DATASETS = {
    "ms1mv3": (93_431, 5_179_510),
    "glint360k": (360_232, 17_091_657),
    "webface4m": (205_990, 4_235_242),
    "webface12m": (617_970, 12_720_066),
    "webface42m": (2_059_906, 42_474_557),
}
# recipe: network, margin, images a GPU, GPUs, sample rate, learning rate, weight decay, epochs, epochs of warm-up
SGD: dict[str, tuple[Any, ...]] = {
    "arcface_r50_ms1mv3": ("iresnet50", "arcface", 128, 8, 1.0, 0.1, 5e-4, 20, 0),
    "arcface_r100_ms1mv3": ("iresnet100", "arcface", 128, 8, 1.0, 0.1, 5e-4, 20, 0),
    "arcface_mbf_ms1mv3": ("mobilefacenet", "arcface", 128, 8, 1.0, 0.1, 1e-4, 40, 0),
    "cosface_r50_glint360k": ("iresnet50", "cosface", 128, 8, 1.0, 0.1, 1e-4, 20, 0),
    "cosface_r100_glint360k": ("iresnet100", "cosface", 128, 8, 1.0, 0.1, 1e-4, 20, 0),
    "cosface_mbf_glint360k": ("mobilefacenet", "cosface", 128, 8, 1.0, 0.1, 1e-4, 20, 0),
    "cosface_r50_webface4m": ("iresnet50", "cosface", 128, 8, 1.0, 0.1, 5e-4, 20, 0),
    "cosface_r100_webface4m": ("iresnet100", "cosface", 128, 8, 1.0, 0.1, 5e-4, 20, 0),
    "cosface_mbf_webface4m": ("mobilefacenet", "cosface", 128, 8, 1.0, 0.1, 1e-4, 20, 0),
    "cosface_r50_webface12m": ("iresnet50", "cosface", 128, 8, 1.0, 0.1, 5e-4, 20, 0),
    "cosface_r100_webface12m": ("iresnet100", "cosface", 128, 8, 1.0, 0.1, 5e-4, 20, 0),
    "cosface_mbf_webface12m": ("mobilefacenet", "cosface", 128, 8, 1.0, 0.1, 1e-4, 20, 0),
    "cosface_r50_webface42m": ("iresnet50", "cosface", 512, 8, 0.2, 0.4, 5e-4, 20, 2),
    "cosface_r100_webface42m": ("iresnet100", "cosface", 256, 16, 0.2, 0.3, 5e-4, 20, 1),
    "cosface_mbf_webface42m": ("mobilefacenet", "cosface", 512, 16, 0.2, 0.4, 1e-4, 20, 2),
}
ADAMW: dict[str, tuple[Any, ...]] = {
    f"cosface_{net}_webface42m": (name, "cosface", 384, 64, 0.2, 1e-3, 0.1, 40, 4)
    for net, name in {"vitt": "vit_t", "vits": "vit_s", "vitb": "vit_b", "vitl": "vit_l"}.items()
}
CVLFACE: dict[str, tuple[Any, ...]] = {"adaface_vitb_webface4m": ("vit_b", "adaface", 224, 8, 1.0, 1e-4, 0.05, 36, 3)}
BASELINES = SGD | ADAMW | CVLFACE
CURVES = {path.stem: json.loads(path.read_text()) for path in sorted((FOLDER / "curves").glob("*.json"))}
CURVES = {name: curve for name, curve in CURVES.items() if "loss_by_epoch" in curve}  # published logs


def load(name: str) -> Recipe:
    return recipes.load(FOLDER / f"{name}.yaml")


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_has_the_values_of_its_source(name: str) -> None:
    network, margin, images_a_gpu, gpus, rate, lr, weight_decay, epochs, warmup = BASELINES[name]
    recipe = load(name)
    values: dict[str, Any] = recipe.model_dump(mode="json")
    (phase,) = values["phases"]
    assert (values["data"]["num_classes"], values["data"]["num_samples"]) == DATASETS[name.rpartition("_")[2]]
    assert (values["backbone"]["name"], values["backbone"]["embedding_dim"]) == (network, 512)
    assert values["classifier"]["margin"]["name"] == margin and values["classifier"]["margin"]["scale"] == 64
    assert values["classifier"]["margin"]["m"] == (0.5 if margin == "arcface" else 0.4)
    assert (phase["global_batch"], phase["micro_batches"]) == (images_a_gpu * gpus, gpus)
    assert phase["sample_rate"] == rate
    optimizer = values["optimizer"]
    assert optimizer["name"] == values["classifier"]["optimizer"]["name"] == ("sgd" if name in SGD else "adamw")
    assert (optimizer["lr"], optimizer["weight_decay"], optimizer["clip"]) == (lr, weight_decay, 5.0)
    # one rate and one decay for the backbone and the class centres
    assert values["classifier"]["optimizer"]["lr"] is values["classifier"]["optimizer"]["weight_decay"] is None
    if name in SGD:
        assert (optimizer["momentum"], optimizer["nesterov"]) == (0.9, False)
    else:
        assert optimizer["betas"] == [0.9, 0.999]
    schedule = recipe.schedule
    assert (schedule.total.amount, schedule.total.unit, schedule.final) == (epochs, "epochs", 0.0)
    assert schedule.warmup.amount == warmup and (not warmup or schedule.warmup.unit == "epochs")
    # arcface_torch decays everything by one factor, and its published logs have a rate that falls with the square
    theirs = name not in CVLFACE
    assert (schedule.shape, optimizer["decay_norms"]) == (("quadratic", True) if theirs else ("cosine", False))
    assert values["method"]["name"] == "classification"


def test_arcface_has_the_gradient_of_arcface_torch() -> None:
    for name in BASELINES:
        margin: Any = load(name).classifier.margin  # type: ignore[union-attr]
        assert getattr(margin, "straight_through", True) or margin.name == "cosface"
    assert load("adaface_vitb_webface4m").classifier.margin.h == 0.333  # type: ignore[union-attr,attr-defined]


def test_cvlface_base_has_its_shape() -> None:
    """CVLface's base: 24 blocks of 512, patch 8 (196 tokens), 16 heads, MLP ratio 3, drop path 0.1."""
    from lvtrain.backbones import create_backbone

    section = load("adaface_vitb_webface4m").backbone
    network = create_backbone(section.name, embedding_dim=512, **section.overrides)
    assert (network.num_tokens, network.dim, len(network.blocks)) == (196, 512, 24)  # type: ignore[arg-type]
    assert network.blocks[0].attn.num_heads == 16  # type: ignore[index,union-attr]
    assert network.blocks[0].mlp.fc1.out_features == 3 * 512  # type: ignore[index,union-attr]


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_is_of_its_recipe(name: str) -> None:
    """As many steps and epochs as the recipe has; what differs is listed; the loss falls."""
    curve, recipe = CURVES[name], load(name)
    differs = curve["differs"]
    batch = differs.get("phases.0.global_batch", recipe.phases[0].global_batch)
    epochs = len(curve["loss_by_epoch"])
    assert epochs == recipe.schedule.total.amount and recipe.data.num_samples
    assert curve["steps"] == pytest.approx(recipe.data.num_samples // batch * epochs, rel=2e-4)
    assert curve["loss_by_epoch"][-1] == min(curve["loss_by_epoch"]) < curve["loss_by_epoch"][0] / 5
    reached = [step for _, step in sorted(curve["step_below_loss"].items(), key=lambda item: -float(item[0]))]
    assert reached == sorted(reached) and reached[-1] <= curve["steps"]
    card = (FOLDER / f"{name}.yaml").read_text().partition("\nname:")[0]
    assert f"curves/{name}.json" in card and f"{curve['images_per_second']:,} images/s on {curve['gpus']} GPUs" in card
    assert (
        f"loss {curve['loss_by_epoch'][0]:.2f} in the first epoch, {curve['loss_by_epoch'][-1]:.2f} in the last" in card
    )
    assert ("(same settings)" in card) == (not differs)


@pytest.mark.parametrize("name", [name for name, curve in CURVES.items() if curve["first"]["step"] <= 20])
def test_the_first_loss_of_a_log_follows_from_the_recipe(name: str) -> None:
    """The loss is `s m + ln(r C) + s^2 / (2 d)`, with sin(m) for ArcFace and the sample rates of the logs.

    Without a warm-up, step 20 is a few per cent above.
    """
    curve, recipe = CURVES[name], load(name)
    rate = curve["differs"].get("phases.0.sample_rate", recipe.phases[0].sample_rate)
    margin = 64 * (math.sin(0.5) if name.startswith("arcface") else 0.4)
    expected = margin + math.log(rate * DATASETS[name.rpartition("_")[2]][0]) + 64**2 / (2 * 512)
    warm = recipe.schedule.warmup.amount or "schedule.warmup" in curve["differs"]
    assert curve["first"]["loss"] == pytest.approx(expected, rel=2e-3 if warm else 3e-2)


def test_every_baseline_is_listed() -> None:
    page = (FOLDER / "README.md").read_text()
    assert [name for name in BASELINES if name not in page] == []
