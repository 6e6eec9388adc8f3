"""Draws of augmentations that are applied one step after another, as torchvision and timm apply them.

A step is (code, amount, extra), one row per sample; `steps.py` applies it. The operations here draw what the released code
of DINO and LAFS draws: `torchvision.transforms.ColorJitter` in random order, timm's RandAugment, blur, grey and solarise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Uniform = Callable[..., np.ndarray]

# the number of a step is its place here; part of no file, so the order may change
NAMES = (
    *("none", "brightness", "contrast", "saturation", "hue", "sharpness", "posterise", "solarise", "blur"),
    *("autocontrast", "equalise", "invert", "rotate", "shear_x", "shear_y", "translate_x", "translate_y"),
)
CODE = {name: number for number, name in enumerate(NAMES)}
_NONE = CODE["none"]


@dataclass(frozen=True)
class JitterSteps:
    """torchvision's ColorJitter with probability `p`: factors 1 ± the value, hue ± a share of a full turn, in random order."""

    p: float
    brightness: float
    contrast: float
    saturation: float
    hue: float

    def draw(self, uniform: Uniform) -> np.ndarray:
        names = ("brightness", "contrast", "saturation", "hue")
        here = uniform("jitter-steps") < self.p
        places = np.argsort(np.stack([uniform(f"jitter-steps/{name}/place") for name in names], axis=1), axis=1)
        low = [max(0.0, 1 - reach) for reach in (self.brightness, self.contrast, self.saturation)] + [-self.hue]
        high = [1 + self.brightness, 1 + self.contrast, 1 + self.saturation, self.hue]
        amounts = np.stack([uniform(f"jitter-steps/{n}", low[i], high[i]) for i, n in enumerate(names)], axis=1)
        codes = np.where(here[:, None], np.array([CODE[name] for name in names]), _NONE)
        return _stack(np.take_along_axis(codes, places, 1), np.take_along_axis(amounts, places, 1))


@dataclass(frozen=True)
class Chance:
    """One step with probability `p`; its amount is drawn from a range."""

    name: str
    p: float
    low: float
    high: float

    def draw(self, uniform: Uniform) -> np.ndarray:
        codes = np.where(uniform(f"{self.name}-step") < self.p, CODE[self.name], _NONE)
        return _stack(codes[:, None], uniform(f"{self.name}-step/amount", self.low, self.high)[:, None])


def grey_step(p: float) -> Chance:
    """No colour, with probability `p`."""
    return Chance("saturation", p, 0.0, 0.0)


def blur_step(p: float, sigma: tuple[float, float]) -> Chance:
    """A Gaussian blur of `sigma` pixels, with probability `p`."""
    return Chance("blur", p, *sigma)


def solarise_step(p: float) -> Chance:
    """Values from 128 on are inverted, with probability `p`."""
    return Chance("solarise", p, 128.0, 128.0)


@dataclass(frozen=True)
class RandSteps:
    """timm's RandAugment `rand-m{magnitude}-mstd{deviation}-inc1`, with the 13 operations of LAFS's released code.

    Each of `count` operations, drawn with replacement, is applied with probability `p`. Its level is normal about the
    magnitude, kept in [0, 10]. Solarise and solarise-add of timm's 15 are left out, as there.
    """

    magnitude: float
    deviation: float = 0.5
    count: int = 2
    p: float = 0.5

    CHOICES = (
        *("autocontrast", "equalise", "invert", "rotate", "posterise", "saturation", "contrast", "brightness"),
        *("sharpness", "shear_x", "shear_y", "translate_x", "translate_y"),
    )

    def draw(self, uniform: Uniform) -> np.ndarray:
        steps = []
        for turn in range(self.count):
            what = f"rand-steps/{turn}"
            choice = (uniform(what) * len(self.CHOICES)).astype(int)
            radius = np.sqrt(-2 * np.log1p(-uniform(f"{what}/radius")))
            normal = radius * np.cos(2 * np.pi * uniform(f"{what}/angle"))
            share = np.clip(self.magnitude + self.deviation * normal, 0, 10) / 10
            signed = np.where(uniform(f"{what}/sign") < 0.5, -share, share)
            cubic = uniform(f"{what}/cubic") < 0.5
            amounts = np.zeros_like(share)
            for number, name in enumerate(self.CHOICES):
                amounts = np.where(choice == number, _amount(name, share, signed), amounts)
            codes = np.array([CODE[name] for name in self.CHOICES])[choice]
            steps.append(np.stack([np.where(uniform(f"{what}/here") < self.p, codes, _NONE), amounts, cubic], axis=1))
        return np.stack(steps, axis=1).astype(np.float32)


def _amount(name: str, share: np.ndarray, signed: np.ndarray) -> np.ndarray:
    """What timm makes of a level: degrees, bits that are kept, factors, shares of the side; 0 where it has no use."""
    if name in ("autocontrast", "equalise", "invert"):
        return np.zeros_like(share)
    if name == "rotate":
        return 30 * signed
    if name == "posterise":
        return 4 - np.floor(4 * share)
    if name.startswith("shear"):
        return 0.3 * signed
    return 0.45 * signed if name.startswith("translate") else 1 + 0.9 * signed


def _stack(codes: np.ndarray, amounts: np.ndarray) -> np.ndarray:
    return np.stack([codes, amounts, np.zeros_like(amounts)], axis=2).astype(np.float32)
