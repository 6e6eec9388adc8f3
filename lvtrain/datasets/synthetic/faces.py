"""What a generated identity looks like, and how its images differ: named numbers, each a function of (seed, identity[, image]).

Every number is uniform in [0, 1) unless its helper says otherwise. The renderer gives it its meaning. The order of the
names is part of the format: a name that is appended changes no other number, a name that is inserted changes every face.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lvtrain import randomness

IDENTITY_NAMES = (
    "skin tone", "skin hue", "face width", "jaw", "chin", "cheeks", "forehead",
    "eye distance", "eye height", "eye width", "eye opening", "eye slant", "iris", "iris size",
    "brow height", "brow thickness", "brow slant", "brow arch",
    "hair colour", "hair shade", "hair line", "hair volume", "hair length", "fringe", "parting",
    "nose length", "nose width", "nose tip",
    "mouth height", "mouth width", "upper lip", "lower lip", "lip colour",
    "beard", "moustache", "ears", "mole", "mole x", "mole y", "freckles", "glasses", "glasses shape", "glasses colour",
)  # fmt: skip

IMAGE_NAMES = (
    "yaw", "pitch", "roll", "scale", "dx", "dy",
    "smile", "mouth opening", "blink", "brow raise", "gaze x", "gaze y",
    "light x", "light y", "light strength", "warmth", "exposure", "contrast", "saturation", "tint",
    "blur", "motion angle", "resolution", "noise",
    "occlusion", "occlusion kind", "occlusion x", "occlusion y", "occlusion width", "occlusion height", "occlusion colour", "occlusion shade",
    "back hue", "back shade", "back hue 2", "back shade 2", "back x", "back y", "back size", "back angle",
    "shirt hue", "shirt shade", "glasses worn",
)  # fmt: skip


@dataclass(frozen=True)
class Difficulty:
    """How difficult the verification problem is.

    Attributes:
        spread: of the identities' numbers around the average face; 1 = all of [0, 1).
        nuisance: strength of pose, lens and occlusion.
        light: strength of the light's variation.
        ranges: (low, high) of an image's number, by its name; the others are in [0, 1).
        shared: numbers of an image that are the same in every image, whatever the seed.
    """

    spread: float
    nuisance: float
    light: float
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    shared: tuple[str, ...] = ()

    def described(self) -> dict[str, Any]:
        """Its values for a dataset's manifest, without `ranges` and `shared` where they are empty."""
        return {name: value for name, value in asdict(self).items() if value not in ({}, ())}


_CALIBRATED = dict.fromkeys(("warmth", "exposure", "contrast", "tint"), (0.425, 0.575)) | {"saturation": (0.4, 0.6)}
_CALM = dict.fromkeys(("smile", "mouth opening", "blink", "brow raise", "gaze x", "gaze y"), (0.25, 0.75))
_MOVED = dict.fromkeys(("scale", "dx", "dy"), (-0.75, 1.75))
_UNCOVERED = {"occlusion": (1.0, 1.0)}

DIFFICULTIES = {
    "normal": Difficulty(spread=1.0, nuisance=0.35, light=1.3),
    "hard": Difficulty(spread=0.85, nuisance=1.0, light=1.3),
    # Images as of one photographer: one backdrop, shirt and lamp, and calibrated cameras. What tells two images apart is
    # then the identity more than the camera, so self-supervised pretraining learns it. With `normal` it does not.
    "album": Difficulty(
        spread=1.0,
        nuisance=0.35,
        light=1.3,
        ranges=_CALIBRATED | _CALM | _MOVED | _UNCOVERED | {"blur": (0.0, 1.5)},
        shared=(
            *("light x", "light y", "light strength", "shirt hue", "shirt shade"),
            *("back hue", "back shade", "back hue 2", "back shade 2", "back x", "back y", "back size", "back angle"),
        ),
    ),
}


def identity_numbers(seed: int, identity: int, difficulty: Difficulty) -> dict[str, float]:
    """The numbers of one identity, float in [0, 1)."""
    draws = randomness.uniform(seed, "synthetic/identity", identity, np.arange(len(IDENTITY_NAMES)))
    draws = 0.5 + difficulty.spread * (draws - 0.5)
    return dict(zip(IDENTITY_NAMES, draws.tolist()))


def image_numbers(seed: int, identity: int, image: int, difficulty: Difficulty) -> dict[str, float]:
    """The numbers of one image of that identity, float in [0, 1) or in the difficulty's range."""
    places = np.arange(len(IMAGE_NAMES))
    numbers = dict(zip(IMAGE_NAMES, randomness.uniform(seed, "synthetic/image", identity, image, places).tolist()))
    for name, (low, high) in difficulty.ranges.items():
        numbers[name] = low + (high - low) * numbers[name]
    if difficulty.shared:
        everywhere = dict(zip(IMAGE_NAMES, randomness.uniform(0, "synthetic/shared", places).tolist()))
        numbers |= {name: everywhere[name] for name in difficulty.shared}
    return numbers


def noise_bytes(seed: int, identity: int, image: int, count: int) -> np.ndarray:
    """Independent uniform bytes, uint8 [count], for sensor noise."""
    words = randomness.bits(seed, "synthetic/noise", identity, image, np.arange((count + 7) // 8))
    return words.astype("<u8").view(np.uint8)[:count]
