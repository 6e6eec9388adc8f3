"""Augmentation: named sets of views, and the draw of every parameter as a function of (seed, epoch, sample).

A set is a list of views. A view is a name, an output size and a list of operations with their ranges. The backends draw
nothing: `draw` turns (seed, epochs, sample ids) into arrays, one row per sample. A backend (`dali`, `torch_backend`) applies them in one fixed order:
crop and resize, affine, colour, posterise, solarise, resize-down, blur, erase, flip, steps, black. So a sample looks the same in every batch, on every rank
and after every restart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lvtrain import randomness
from lvtrain.data.step_draws import Chance, JitterSteps, RandSteps, Uniform, blur_step, grey_step, solarise_step
from lvtrain.recipe.registry import AUGMENTATIONS

Range = tuple[float, float]


@dataclass(frozen=True)
class Draws:
    """Parameters of one view for k samples; an operation whose field is None is not applied.

    Attributes:
        crop: float32 [k, 4]: x0, y0, x1, y1 as shares of width and height.
        crop_cubic: the same, resized with bicubic instead of bilinear interpolation.
        flip: int32 [k], 1 mirrors.
        affine: float32 [k, 2, 3]: output to input coordinates (x, y), in units of the image size, origin in its middle.
        colour: float32 [k, 4]: brightness, contrast and saturation factors, hue in degrees (DALI's `color_twist`).
        posterise: uint8 [k]: mask of the bits that are kept.
        solarise: int32 [k]: values from this one on are inverted; 256 inverts none.
        down: float32 [k]: the image is reduced to this share of its size and enlarged again; 0: not at all.
        blur: float32 [k]: Gaussian sigma in pixels of the output; 0: none.
        erase: float32 [k, 4]: x, y, width, height as shares, filled with mid-grey; width 0: none.
        steps: float32 [k, n, 3]: operations in their own order for each sample, see `step_draws`.
        black: as `erase`, filled with black, after the steps.
    """

    crop: np.ndarray | None = None
    crop_cubic: np.ndarray | None = None
    flip: np.ndarray | None = None
    affine: np.ndarray | None = None
    colour: np.ndarray | None = None
    posterise: np.ndarray | None = None
    solarise: np.ndarray | None = None
    down: np.ndarray | None = None
    blur: np.ndarray | None = None
    erase: np.ndarray | None = None
    steps: np.ndarray | None = None
    black: np.ndarray | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: value for name, value in vars(self).items() if value is not None}


# --------------------------------------------------------------------------------------------------------- operations


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


@dataclass(frozen=True)
class Flip:
    """Mirror left and right."""

    p: float = 0.5


@dataclass(frozen=True)
class Jitter:
    """Brightness, contrast and saturation times 1 ± the value, hue turned by ± the value of a full turn."""

    p: float
    brightness: float
    contrast: float
    saturation: float
    hue: float = 0.0


@dataclass(frozen=True)
class Grey:
    """No colour; luminance stays."""

    p: float


@dataclass(frozen=True)
class Blur:
    """With probability `p`, a Gaussian blur; its sigma, in pixels, is drawn from a range."""

    p: float
    sigma: Range


@dataclass(frozen=True)
class Down:
    """Reduces the image to `factor` of its size and enlarges it again, so it looks like a small face."""

    p: float
    factor: Range


@dataclass(frozen=True)
class Solarise:
    """Values from 128 on are inverted."""

    p: float


@dataclass(frozen=True)
class Erase:
    """With probability `p`, fills a random rectangle; its area (share of the image) and its ratio are drawn from ranges."""

    p: float
    area: Range
    ratio: Range = (0.3, 3.3)
    black: bool = False


@dataclass(frozen=True)
class RandAugment:
    """`count` operations drawn from a list, all at `magnitude` of 30 (Cubuk et al., 2020).

    The list: identity, brightness, contrast, saturation, posterise, solarise, blur, shear x and y, translate x and y, rotate. Autocontrast,
    equalise and sharpness of the original are left out: the backends have no equal versions of them.
    """

    count: int = 2
    magnitude: float = 9.0


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


# --------------------------------------------------------------------------------------------------------------- sets

_DINO_JITTER = Jitter(0.8, 0.4, 0.4, 0.2, 0.1)
# for the small recipes' 56 pixels and generated faces, whose light and exposure identify an image more than in photographs
_SMALL_JITTER = Jitter(0.9, 0.6, 0.6, 0.4, 0.1)
# for generated faces of difficulty `album`, which an identity's colours tell apart
_ALBUM_JITTER = Jitter(0.8, 0.4, 0.4, 0.2, 0.05)


def _dino(
    local_scale: Range,
    local_size: int | None,
    jitter: Jitter = _DINO_JITTER,
    radius: Range = (0.1, 2.0),
    local_views: int = 8,
) -> tuple[View, ...]:
    """DINO's views (Caron et al., 2021): two global ones (one always blurred, one sometimes solarised) and eight local ones."""
    whole, colour = Crop((0.4, 1.0)), (Flip(), jitter, Grey(0.2))
    return (
        View("global_0", (whole, *colour, Blur(1.0, radius))),
        View("global_1", (whole, *colour, Blur(0.1, radius), Solarise(0.2))),
        *(View(f"local_{i}", (Crop(local_scale), *colour, Blur(0.5, radius)), local_size) for i in range(local_views)),
    )


def with_clean_twin(views: tuple[View, ...]) -> tuple[View, ...]:
    """The views, and beside `image` a view `clean`: the same crop and flip and nothing else.

    It has no draws of its own, so `image` is the same with and without it.
    """
    (image,) = (view for view in views if view.name == "image")
    return *views, _twin(image, "clean")


def _twin(view: View, name: str) -> View:
    return View(name, tuple(op for op in view.ops if isinstance(op, Crop | Flip)), view.size, view.name)


def _with_landmark_twins(views: tuple[View, ...]) -> tuple[View, ...]:
    """Adds to each view a `NAME_landmarks` with the same crop and flip and nothing else, for LAFS's landmark CNN."""
    return views + tuple(_twin(view, f"{view.name}_landmarks") for view in views)


def _dino_released(local_scale: Range, local_size: int | None) -> tuple[View, ...]:
    """DINO's views as its code draws them, and LAFS's: crops drawn again, bicubic, jitter in random order, solarise last."""
    jitter, sigma = JitterSteps(0.8, 0.4, 0.4, 0.2, 0.1), (0.1, 2.0)
    whole, colour = Crop((0.4, 1.0), tries=10, cubic=True), (Flip(), jitter, grey_step(0.2))
    local = Crop(local_scale, tries=10, cubic=True)
    return (
        View("global_0", (whole, *colour, blur_step(1.0, sigma))),
        View("global_1", (whole, *colour, blur_step(0.1, sigma), solarise_step(0.2))),
        *(View(f"local_{i}", (local, *colour, blur_step(0.5, sigma)), local_size) for i in range(8)),
    )


def _lafs_finetune(magnitude: float) -> tuple[View, ...]:
    """The released code's views for fine-tuning. Our reading: the crop comes before RandAugment, there after it."""
    crop, erase = Crop((0.9, 1.0), tries=10), Erase(0.5, (0.02, 0.1), black=True)
    return (View("image", (crop, Flip(), RandSteps(magnitude), JitterSteps(1.0, 0.1, 0.1, 0.1, 0.1), erase)),)


_RAND_AUGMENT = (Flip(), RandAugment(2, 9.0), Erase(0.25, (0.02, 0.2)))

SETS: dict[str, tuple[View, ...]] = {
    # nothing, and the flip that every face trainer uses
    "none": (View("image"),),
    "flip": (View("image", (Flip(),)),),
    # the kinds of arcface_torch's optional DALI augmentation: some faces are small, blurred, tinted or grey
    "arcface": (
        View(
            "image",
            (Flip(), Jitter(0.1, 0.3, 0.3, 0.3, 0.05), Grey(0.1), Down(0.1, (0.25, 0.9)), Blur(0.1, (0.2, 1.5))),
        ),
    ),
    "strong": (
        View(
            "image",
            (
                Crop((0.7, 1.0)),
                Flip(),
                Jitter(0.5, 0.4, 0.4, 0.4, 0.05),
                Grey(0.1),
                Down(0.2, (0.2, 0.9)),
                Blur(0.2, (0.2, 2.0)),
                Erase(0.25, (0.02, 0.2)),
            ),
        ),
    ),
    # small and blurred faces, for a student of a teacher that sees the clean image (method.distill.view)
    "degraded": (View("image", (Flip(), Down(0.8, (0.15, 0.9)), Blur(0.5, (0.2, 2.0)))),),
    # a strong one for fine-tuning
    "randaugment": (View("image", _RAND_AUGMENT),),
    # LAFS fine-tuning as its released code draws it: magnitude 1 of 10 on WebFace4M, 2 on MS1MV3
    "lafs_finetune": _lafs_finetune(1.0),
    "lafs_finetune_ms1mv3": _lafs_finetune(2.0),
    # self-supervision. Local crops: [0.05, 0.4] is the default of DINO's own code (--local_crops_scale), [0.08, 0.4] what LAFS says it starts
    # from (supplement 8.1.3); 48 pixels of 112 are LAFS's, 24 and half the blur the same share of small recipes' 56
    "dino": _dino((0.05, 0.4), 48),
    "dino_faces": _dino((0.08, 0.4), 48),
    "dino_faces_56": _dino((0.08, 0.4), 24, _SMALL_JITTER, (0.1, 1.0)),
    # for generated faces of difficulty `album`: fewer and larger local crops, which teach more in a few thousand steps
    "dino_album_56": _dino((0.25, 0.6), 32, _ALBUM_JITTER, (0.1, 1.0), local_views=4),
    # LAFS crops its student views as the global ones, [0.4, 1.0] (section 3.2 and supplement 8.1.3), at full size
    "lafs": _with_landmark_twins(_dino((0.4, 1.0), None)),
    "lafs_56": _with_landmark_twins(_dino((0.4, 1.0), None, _SMALL_JITTER, (0.1, 1.0))),
    # the same as the released code draws them (the sets above are those of runs begun before)
    "dino_released": _dino_released((0.05, 0.4), 48),
    "dino_faces_released": _dino_released((0.08, 0.4), 48),
    "lafs_released": _with_landmark_twins(_dino_released((0.4, 1.0), None)),
    "lafs_album_56": _with_landmark_twins(_dino((0.4, 1.0), None, _ALBUM_JITTER, (0.1, 1.0), local_views=4)),
}

for _name, _views in SETS.items():
    AUGMENTATIONS.register(_name)(_views)


def augmentation(name: str) -> tuple[View, ...]:
    """The views of a named set.

    Raises:
        UserError: no such set; the known ones are listed.
    """
    views: tuple[View, ...] = AUGMENTATIONS.get(name)
    return views


# -------------------------------------------------------------------------------------------------------------- draws


def draw(view: View, seed: int, epochs: np.ndarray, ids: np.ndarray) -> Draws:
    """Parameters of one view for (epoch, sample id) pairs int64 [k] each."""

    def uniform(what: str, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        return low + (high - low) * randomness.uniform(seed, f"augment/{view.twin or view.name}/{what}", epochs, ids)

    parts = _Parts(len(ids))
    for op in view.ops:
        _DRAW[type(op)](op, parts, uniform)
    return parts.draws()


class _Parts:
    """All parameters start neutral, because several operations may change the same one (jitter and grey change the saturation)."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.used: set[str] = set()
        self.crop = np.zeros((k, 4))
        self.flip = np.zeros(k, dtype=bool)
        self.affine = np.tile(np.eye(3), (k, 1, 1))
        self.colour = np.tile([1.0, 1.0, 1.0, 0.0], (k, 1))
        self.posterise = np.full(k, 255)
        self.solarise = np.full(k, 256)
        self.down = np.zeros(k)
        self.blur = np.zeros(k)
        self.erase = np.zeros((k, 4))
        self.black = np.zeros((k, 4))
        self.crop_cubic = np.zeros((k, 4))
        self._steps: list[np.ndarray] = []

    @property
    def steps(self) -> np.ndarray:
        return np.concatenate(self._steps, axis=1)

    def add_steps(self, steps: np.ndarray) -> None:
        self.used.add("steps")
        self._steps.append(steps)

    def draws(self) -> Draws:
        kinds = {"flip": np.int32, "posterise": np.uint8, "solarise": np.int32}
        found = {name: getattr(self, name).astype(kinds.get(name, np.float32)) for name in self.used}
        if "affine" in found:
            found["affine"] = np.ascontiguousarray(found["affine"][:, :2])
        return Draws(**found)


def _crop(op: Crop, parts: _Parts, uniform: Uniform) -> None:
    parts.used.add("crop_cubic" if op.cubic else "crop")
    if op.tries:
        box = _redrawn_box(op, parts.k, uniform)
    else:
        wide, high = _sides(op, uniform, "crop/")
        width, height = np.minimum(wide, 1.0), np.minimum(high, 1.0)
        left, top = uniform("crop/x") * (1 - width), uniform("crop/y") * (1 - height)
        box = np.stack([left, top, left + width, top + height], axis=1)
    setattr(parts, "crop_cubic" if op.cubic else "crop", box)


def _redrawn_box(op: Crop, k: int, uniform: Uniform) -> np.ndarray:
    """Torchvision's `RandomResizedCrop`, in whole pixels of a square image of 112 (the size of aligned faces)."""
    side = 112
    width, height = np.full(k, side), np.full(k, side)
    for turn in reversed(range(op.tries)):  # the first that fits counts
        wide, high = (np.rint(side * share) for share in _sides(op, uniform, f"crop/{turn}/"))
        fits = (wide <= side) & (high <= side)
        width, height = np.where(fits, wide, width), np.where(fits, high, height)
    left = np.floor(uniform("crop/x") * (side - width + 1))
    top = np.floor(uniform("crop/y") * (side - height + 1))
    return np.stack([left, top, left + width, top + height], axis=1) / side


def _sides(op: Crop, uniform: Uniform, what: str) -> tuple[np.ndarray, np.ndarray]:
    area = uniform(f"{what}area", *op.scale)
    root = np.sqrt(np.exp(uniform(f"{what}ratio", np.log(op.ratio[0]), np.log(op.ratio[1]))))
    return np.sqrt(area) * root, np.sqrt(area) / root


def _flip(op: Flip, parts: _Parts, uniform: Uniform) -> None:
    parts.used.add("flip")
    parts.flip = uniform("flip") < op.p


def _jitter(op: Jitter, parts: _Parts, uniform: Uniform) -> None:
    parts.used.add("colour")
    here = uniform("jitter") < op.p
    for column, (name, reach) in enumerate(
        (("brightness", op.brightness), ("contrast", op.contrast), ("saturation", op.saturation))
    ):
        parts.colour[:, column] *= np.where(here, uniform(name, 1 - reach, 1 + reach), 1.0)
    parts.colour[:, 3] += np.where(here, uniform("hue", -360 * op.hue, 360 * op.hue), 0.0)


def _grey(op: Grey, parts: _Parts, uniform: Uniform) -> None:
    parts.used.add("colour")
    parts.colour[uniform("grey") < op.p, 2] = 0.0


def _blur(op: Blur, parts: _Parts, uniform: Uniform) -> None:
    parts.used.add("blur")
    parts.blur = np.where(uniform("blur") < op.p, uniform("blur/sigma", *op.sigma), parts.blur)


def _down(op: Down, parts: _Parts, uniform: Uniform) -> None:
    parts.used.add("down")
    parts.down = np.where(uniform("down") < op.p, uniform("down/factor", *op.factor), 0.0)


def _solarise(op: Solarise, parts: _Parts, uniform: Uniform) -> None:
    parts.used.add("solarise")
    parts.solarise = np.where(uniform("solarise") < op.p, 128, parts.solarise)


def _erase(op: Erase, parts: _Parts, uniform: Uniform) -> None:
    parts.used.add("black" if op.black else "erase")
    area = uniform("erase/area", *op.area)
    root = np.sqrt(np.exp(uniform("erase/ratio", np.log(op.ratio[0]), np.log(op.ratio[1]))))
    width, height = np.minimum(np.sqrt(area) * root, 1.0), np.minimum(np.sqrt(area) / root, 1.0)
    here = uniform("erase") < op.p
    box = np.stack([uniform("erase/x") * (1 - width), uniform("erase/y") * (1 - height), width, height], axis=1)
    setattr(parts, "black" if op.black else "erase", np.where(here[:, None], box, 0.0))


def _steps(op: JitterSteps | Chance | RandSteps, parts: _Parts, uniform: Uniform) -> None:
    parts.add_steps(op.draw(uniform))


_RAND_CHOICES = (
    "identity",
    "brightness",
    "contrast",
    "saturation",
    "posterise",
    "solarise",
    "blur",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
)


def _rand_augment(op: RandAugment, parts: _Parts, uniform: Uniform) -> None:
    parts.used |= {"affine", "colour", "posterise", "solarise", "blur"}
    strength = op.magnitude / 30.0
    for turn in range(op.count):
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


def _affine(name: str, amount: np.ndarray) -> np.ndarray:
    matrix = np.tile(np.eye(3), (len(amount), 1, 1))
    if name == "rotate":
        angle = np.deg2rad(30 * amount)
        matrix[:, 0, 0] = matrix[:, 1, 1] = np.cos(angle)
        matrix[:, 0, 1], matrix[:, 1, 0] = -np.sin(angle), np.sin(angle)
    else:
        row = 0 if name.endswith("x") else 1
        matrix[:, row, 1 - row if name.startswith("shear") else 2] = (
            0.3 if name.startswith("shear") else 0.45
        ) * amount
    return matrix


_DRAW: dict[type, Callable[..., None]] = {
    Crop: _crop,
    Flip: _flip,
    Jitter: _jitter,
    Grey: _grey,
    Blur: _blur,
    Down: _down,
    Solarise: _solarise,
    Erase: _erase,
    RandAugment: _rand_augment,
    JitterSteps: _steps,
    Chance: _steps,
    RandSteps: _steps,
}
