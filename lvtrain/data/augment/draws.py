"""What is drawn for the samples of a batch: one array a parameter, one row a sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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


class Parts:
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
