"""Steps: each operation's pixels against torchvision and timm with the same parameters, and the draws' statistics against theirs."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data import auto_augment
from torchvision import transforms
from torchvision.transforms.v2 import functional

from lvtrain.data.augment import augmentation, draw
from lvtrain.data.augment.step_draws import CODE, NAMES, RandSteps
from lvtrain.data.decoding.steps import apply_steps
from tests.shard_data import jpeg

PICTURE = Image.open(io.BytesIO(jpeg(5))).convert("RGB")
IMAGE = torch.from_numpy(np.array(PICTURE)).permute(2, 0, 1).contiguous()
OTHER = IMAGE.flip(1, 2)
K = 4000
EPOCHS, IDS = np.arange(K) % 3, np.arange(K) * 7


def ours(name: str, amount: float, cubic: bool = False) -> torch.Tensor:
    """The operation on IMAGE, in a batch whose other image has another amount."""
    steps = np.array([[[CODE[name], amount, cubic]], [[CODE["none"], 0, 0]]], dtype=np.float32)
    found = apply_steps(torch.stack([IMAGE, OTHER]), steps)
    assert torch.equal(found[1], OTHER)
    return found[0]


@pytest.mark.parametrize(
    ("name", "amount", "theirs"),
    [
        ("brightness", 0.7, lambda x, a: functional.adjust_brightness(x, a)),
        ("brightness", 1.4, lambda x, a: functional.adjust_brightness(x, a)),
        ("contrast", 0.6, lambda x, a: functional.adjust_contrast(x, a)),
        ("contrast", 1.4, lambda x, a: functional.adjust_contrast(x, a)),
        ("saturation", 0.0, lambda x, a: functional.adjust_saturation(x, a)),
        ("saturation", 1.2, lambda x, a: functional.adjust_saturation(x, a)),
        ("sharpness", 1.8, lambda x, a: functional.adjust_sharpness(x, a)),
        ("hue", 0.1, lambda x, a: functional.adjust_hue(x, a)),
        ("hue", -0.07, lambda x, a: functional.adjust_hue(x, a)),
        ("posterise", 4, lambda x, a: functional.posterize(x, a)),
        ("posterise", 8, lambda x, a: x),
        ("solarise", 128, lambda x, a: functional.solarize(x, a)),
        ("autocontrast", 0, lambda x, a: functional.autocontrast(x)),
        ("equalise", 0, lambda x, a: functional.equalize(x)),
        ("invert", 0, lambda x, a: functional.invert(x)),
        ("blur", 1.3, lambda x, a: functional.gaussian_blur(x, [13, 13], [a, a])),
    ],
)
def test_pixels_are_torchvisions(name: str, amount: float, theirs: Any) -> None:
    difference = (ours(name, amount).int() - theirs(IMAGE, amount).int()).abs()
    assert difference.max() <= 1 and difference.float().mean() < 0.06  # a rounding at most


TIMM = {
    "autocontrast": "AutoContrast", "equalise": "Equalize", "invert": "Invert", "rotate": "Rotate",
    "posterise": "PosterizeIncreasing", "saturation": "ColorIncreasing", "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing", "sharpness": "SharpnessIncreasing", "shear_x": "ShearX", "shear_y": "ShearY",
    "translate_x": "TranslateXRel", "translate_y": "TranslateYRel",
}  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("cubic", [False, True])
def test_pixels_and_amounts_are_timms(name: str, cubic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timm's operation at a level of 1.7 against ours with the amount that we draw for it."""
    interpolation = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
    operation = auto_augment.AugmentOp(TIMM[name], 1.0, 1.7, {"interpolation": interpolation})
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value: -value)
    theirs = torch.from_numpy(np.array(operation(PICTURE))).permute(2, 0, 1)
    drawn = RandSteps(1.7, deviation=0.0, count=1, p=1.0).draw(_uniform(name))[0, 0]
    assert NAMES[int(drawn[0])] == name
    difference = (ours(name, drawn[1], cubic)[:, 4:-4, 4:-4].int() - theirs[:, 4:-4, 4:-4].int()).abs().float()
    geometric = name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
    # Pillow's cubic is sharper than torch's; its whole-number arithmetic truncates
    assert difference.mean() < ((4.0 if cubic else 1.0) if geometric else 1.0)


def _uniform(name: str) -> Any:
    def uniform(what: str, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        if what == "rand-steps/0":
            return np.array([(RandSteps.CHOICES.index(name) + 0.5) / len(RandSteps.CHOICES)])
        return np.array([0.25])

    return uniform


def test_rand_augment_draws_as_timm_does() -> None:
    """Which operations, how often, and their levels, against 4,000 draws of timm with the 13 operations."""
    steps = draw(augmentation("lafs_finetune")[0], 1, EPOCHS, IDS).steps
    assert steps is not None
    rand = steps[:, :2].reshape(-1, 3)
    random.seed(0)
    np.random.seed(0)
    operations = auto_augment.rand_augment_ops(1, 0.5, {"magnitude_std": 0.5}, list(TIMM.values()))
    calls: list[tuple[str, float]] = []
    for operation in operations:
        operation.aug_fn = lambda image, *a, _name=operation.name, **_: calls.append((_name, a[0] if a else 0)) or image
    transform = auto_augment.RandAugment(operations, 2)
    for _ in range(K):
        transform(PICTURE)
    ours_used = rand[rand[:, 0] != CODE["none"]]
    assert stats.binomtest(len(ours_used), 2 * K, 0.5).pvalue > 1e-3
    for name, theirs in TIMM.items():
        mine = ours_used[ours_used[:, 0] == CODE[name], 1]
        values = np.array([value for called, value in calls if called == theirs])
        assert stats.binomtest(len(mine), len(ours_used), 1 / 13).pvalue > 1e-4, name
        if values.std() > 0:
            assert stats.ks_2samp(mine, values).pvalue > 1e-4, name
        else:
            assert mine.std() == 0 and (name in ("autocontrast", "equalise", "invert") or mine[0] == values[0]), name
    strong = draw(augmentation("lafs_finetune_ms1mv3")[0], 1, EPOCHS, IDS).steps
    assert strong is not None and strong[..., 1].std() > steps[..., 1].std()


@pytest.mark.parametrize(("name", "scale"), [("dino_released", (0.4, 1.0)), ("lafs_finetune", (0.9, 1.0))])
def test_crops_are_drawn_again_as_torchvision_draws_them(name: str, scale: tuple[float, float]) -> None:
    draws = draw(augmentation(name)[0], 1, EPOCHS, IDS)
    box = draws.crop if draws.crop_cubic is None else draws.crop_cubic
    assert box is not None
    torch.manual_seed(0)
    theirs = np.array([transforms.RandomResizedCrop.get_params(IMAGE, list(scale), [3 / 4, 4 / 3]) for _ in range(K)])
    left, top, right, bottom = np.rint(112 * box).T
    drawn = {"top": top, "left": left, "height": bottom - top, "width": right - left}
    for place, (side, mine) in enumerate(drawn.items()):
        assert stats.ks_2samp(mine, theirs[:, place]).pvalue > 1e-3, side
    area = (bottom - top) * (right - left) / 112**2
    assert stats.ks_2samp(area, theirs[:, 2] * theirs[:, 3] / 112**2).pvalue > 1e-3
    if scale[0] == 0.4:
        assert area.mean() == pytest.approx(0.643, abs=0.008)


def test_jitter_and_erasing_are_drawn_as_torchvision_draws_them() -> None:
    draws = draw(augmentation("lafs_finetune")[0], 1, EPOCHS, IDS)
    assert draws.steps is not None and draws.black is not None
    jitter = draws.steps[:, 2:]
    assert stats.chisquare(np.bincount(jitter[:, 0, 0].astype(int) - 1)).pvalue > 1e-4  # each is first as often
    assert (np.sort(jitter[:, :, 0], axis=1) == np.arange(1, 5)).all()
    for name, low, high in (
        ("brightness", 0.9, 0.2),
        ("contrast", 0.9, 0.2),
        ("saturation", 0.9, 0.2),
        ("hue", -0.1, 0.2),
    ):
        assert stats.kstest(jitter[..., 1][jitter[..., 0] == CODE[name]], "uniform", (low, high)).pvalue > 1e-4, name
    torch.manual_seed(0)
    here = draws.black[:, 2] > 0
    assert stats.binomtest(int(here.sum()), K, 0.5).pvalue > 1e-4
    theirs = [transforms.RandomErasing.get_params(IMAGE, (0.02, 0.1), (0.3, 3.3), [0.0])[:4] for _ in range(2000)]
    area = np.array([height * width for _, _, height, width in theirs]) / 112**2
    assert stats.ks_2samp(draws.black[here, 2] * draws.black[here, 3], area).pvalue > 1e-4


def test_black_rectangles_lie_where_they_are_drawn() -> None:
    images = torch.full((2, 3, 10, 20), 9, dtype=torch.uint8)
    found = apply_steps(images, None, np.array([[0.1, 0.2, 0.5, 0.3], [0.3, 0.3, 0.0, 0.0]], dtype=np.float32))
    expected = images.clone()
    expected[0, :, 2:5, 2:12] = 0
    assert torch.equal(found, expected)
