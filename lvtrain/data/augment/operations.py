"""The operations of augmentation, and the draw of every parameter as a function of (seed, epoch, sample).

A view is a name, an output size and a list of operations with their ranges. The backends draw nothing: `draw` turns
(seed, epochs, sample ids) into arrays, one row per sample. A backend (`dali`, `torch_backend`) applies them in one fixed
order: crop and resize, affine, colour, posterise, solarise, resize-down, blur, erase, flip, steps, black. So a sample
looks the same in every batch, on every rank and after every restart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lvtrain import randomness
from lvtrain.data.augment.draws import Draws, Parts
from lvtrain.data.augment.step_draws import Chance, JitterSteps, RandSteps, Uniform

Range = tuple[float, float]
_RAND_CHOICES = (
    *("identity", "brightness", "contrast", "saturation", "posterise", "solarise", "blur"),
    *("shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
)


@dataclass(frozen=True)
class Crop:
    """Crops a random rectangle of `scale` times the area and of a width-to-height `ratio`, and resizes it (Inception's crop).

    A rectangle that is wider or higher than the image is cut to it. With `tries`, it is drawn again, that many times in
    all, and then the crop is the whole image: torchvision's rule for a square image. With [0.4, 1] the mean area is then
    0.643, and without 0.692.
    """

    scale: Range
    ratio: Range = (3 / 4, 4 / 3)
    tries: int = 0
    cubic: bool = False

    def draw(self, parts: Parts, uniform: Uniform) -> None:
        parts.used.add("crop_cubic" if self.cubic else "crop")
        if self.tries:
            box = _redrawn_box(self, parts.k, uniform)
        else:
            width, height = (np.minimum(share, 1.0) for share in _sides(self.scale, self.ratio, uniform, "crop/"))
            left, top = uniform("crop/x") * (1 - width), uniform("crop/y") * (1 - height)
            box = np.stack([left, top, left + width, top + height], axis=1)
        setattr(parts, "crop_cubic" if self.cubic else "crop", box)


@dataclass(frozen=True)
class Flip:
    """Mirror left and right."""

    p: float = 0.5

    def draw(self, parts: Parts, uniform: Uniform) -> None:
        parts.used.add("flip")
        parts.flip = uniform("flip") < self.p


@dataclass(frozen=True)
class Jitter:
    """Brightness, contrast and saturation times 1 ± the value, hue turned by ± the value of a full turn."""

    p: float
    brightness: float
    contrast: float
    saturation: float
    hue: float = 0.0

    def draw(self, parts: Parts, uniform: Uniform) -> None:
        parts.used.add("colour")
        here = uniform("jitter") < self.p
        for column, (name, reach) in enumerate(
            (("brightness", self.brightness), ("contrast", self.contrast), ("saturation", self.saturation))
        ):
            parts.colour[:, column] *= np.where(here, uniform(name, 1 - reach, 1 + reach), 1.0)
        parts.colour[:, 3] += np.where(here, uniform("hue", -360 * self.hue, 360 * self.hue), 0.0)


@dataclass(frozen=True)
class Grey:
    """No colour; luminance stays."""

    p: float

    def draw(self, parts: Parts, uniform: Uniform) -> None:
        parts.used.add("colour")
        parts.colour[uniform("grey") < self.p, 2] = 0.0


@dataclass(frozen=True)
class Blur:
    """With probability `p`, a Gaussian blur; its sigma, in pixels, is drawn from a range."""

    p: float
    sigma: Range

    def draw(self, parts: Parts, uniform: Uniform) -> None:
        parts.used.add("blur")
        parts.blur = np.where(uniform("blur") < self.p, uniform("blur/sigma", *self.sigma), parts.blur)


@dataclass(frozen=True)
class Down:
    """Reduces the image to `factor` of its size and enlarges it again, so it looks like a small face."""

    p: float
    factor: Range

    def draw(self, parts: Parts, uniform: Uniform) -> None:
        parts.used.add("down")
        parts.down = np.where(uniform("down") < self.p, uniform("down/factor", *self.factor), 0.0)


@dataclass(frozen=True)
class Solarise:
    """Values from 128 on are inverted."""

    p: float

    def draw(self, parts: Parts, uniform: Uniform) -> None:
        parts.used.add("solarise")
        parts.solarise = np.where(uniform("solarise") < self.p, 128, parts.solarise)


@dataclass(frozen=True)
class Erase:
    """With probability `p`, fills a random rectangle; its area (share of the image) and its ratio are drawn from ranges."""

    p: float
    area: Range
    ratio: Range = (0.3, 3.3)
    black: bool = False

    def draw(self, parts: Parts, uniform: Uniform) -> None:
        parts.used.add("black" if self.black else "erase")
        width, height = (np.minimum(share, 1.0) for share in _sides(self.area, self.ratio, uniform, "erase/"))
        here = uniform("erase") < self.p
        box = np.stack([uniform("erase/x") * (1 - width), uniform("erase/y") * (1 - height), width, height], axis=1)
        setattr(parts, "black" if self.black else "erase", np.where(here[:, None], box, 0.0))


@dataclass(frozen=True)
class RandAugment:
    """`count` operations drawn from a list, all at `magnitude` of 30 (Cubuk et al., 2020).

    The list: identity, brightness, contrast, saturation, posterise, solarise, blur, shear x and y, translate x and y, rotate. Autocontrast,
    equalise and sharpness of the original are left out: the backends have no equal versions of them.
    """

    count: int = 2
    magnitude: float = 9.0

    def draw(self, parts: Parts, uniform: Uniform) -> None:
        parts.used |= {"affine", "colour", "posterise", "solarise", "blur"}
        strength = self.magnitude / 30.0
        for turn in range(self.count):
            choice = (uniform(f"rand/{turn}") * len(_RAND_CHOICES)).astype(int)
            sign = np.where(uniform(f"rand/{turn}/sign") < 0.5, -1.0, 1.0)
            for number, name in enumerate(_RAND_CHOICES):
                rows = np.flatnonzero(choice == number)
                amount = sign[rows] * strength
                if name in ("brightness", "contrast", "saturation"):
                    parts.colour[rows, ("brightness", "contrast", "saturation").index(name)] *= 1 + 0.9 * amount
                elif name == "posterise":
                    parts.posterise[rows] &= 0xFF << round(4 * strength) & 0xFF
                elif name == "solarise":
                    parts.solarise[rows] = np.minimum(parts.solarise[rows], round(256 * (1 - strength)))
                elif name == "blur":
                    parts.blur[rows] = np.maximum(parts.blur[rows], 2.0 * strength)
                elif name != "identity":
                    parts.affine[rows] = parts.affine[rows] @ _affine(name, amount)


def _redrawn_box(op: Crop, k: int, uniform: Uniform) -> np.ndarray:
    """Torchvision's `RandomResizedCrop`, in whole pixels of a square image of 112 (the size of aligned faces)."""
    side = 112
    width, height = np.full(k, side), np.full(k, side)
    for turn in reversed(range(op.tries)):  # the first that fits counts
        wide, high = (np.rint(side * share) for share in _sides(op.scale, op.ratio, uniform, f"crop/{turn}/"))
        fits = (wide <= side) & (high <= side)
        width, height = np.where(fits, wide, width), np.where(fits, high, height)
    left = np.floor(uniform("crop/x") * (side - width + 1))
    top = np.floor(uniform("crop/y") * (side - height + 1))
    return np.stack([left, top, left + width, top + height], axis=1) / side


def _sides(areas: Range, ratios: Range, uniform: Uniform, what: str) -> tuple[np.ndarray, np.ndarray]:
    area = uniform(f"{what}area", *areas)
    root = np.sqrt(np.exp(uniform(f"{what}ratio", np.log(ratios[0]), np.log(ratios[1]))))
    return np.sqrt(area) * root, np.sqrt(area) / root


def _affine(name: str, amount: np.ndarray) -> np.ndarray:
    matrix = np.tile(np.eye(3), (len(amount), 1, 1))
    if name == "rotate":
        angle = np.deg2rad(30 * amount)
        matrix[:, 0, 0] = matrix[:, 1, 1] = np.cos(angle)
        matrix[:, 0, 1], matrix[:, 1, 0] = -np.sin(angle), np.sin(angle)
    else:
        row = 0 if name.endswith("x") else 1
        column, reach = (1 - row, 0.3) if name.startswith("shear") else (2, 0.45)
        matrix[:, row, column] = reach * amount
    return matrix


Op = Crop | Flip | Jitter | Grey | Blur | Down | Solarise | Erase | RandAugment | JitterSteps | Chance | RandSteps


@dataclass(frozen=True)
class View:
    """One image of a sample, `[3, size, size]`; `size=None` is the recipe's image size.

    `twin` names the view whose draws this one shares, operation by operation. For example, a landmark view has the
    crop and flip of its colour twin.
    """

    name: str
    ops: tuple[Op, ...] = ()
    size: int | None = None
    twin: str | None = None


def draw(view: View, seed: int, epochs: np.ndarray, ids: np.ndarray) -> Draws:
    """Parameters of one view for (epoch, sample id) pairs int64 [k] each."""

    def uniform(what: str, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        return low + (high - low) * randomness.uniform(seed, f"augment/{view.twin or view.name}/{what}", epochs, ids)

    parts = Parts(len(ids))
    for op in view.ops:
        if isinstance(op, JitterSteps | Chance | RandSteps):
            parts.add_steps(op.draw(uniform))
        else:
            op.draw(parts, uniform)
    return parts.draws()
