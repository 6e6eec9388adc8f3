"""Photographs a drawn face: under a lamp, with a colour cast, through a poor lens, on a noisy sensor."""

from __future__ import annotations

from statistics import NormalDist

import cv2
import numpy as np

from lvtrain.datasets.synthetic.faces import Difficulty

SIZE = 112
_GRID_Y, _GRID_X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
# standard normal deviate of each byte: a look-up, because noise is half of all numbers drawn
_NORMAL = np.array([NormalDist().inv_cdf((byte + 0.5) / 256) for byte in range(256)], dtype=np.float32)


def span(number: float, low: float, high: float) -> float:
    """Turns a number from 0 to 1 into one from low to high."""
    return low + number * (high - low)


def bell(number: float, width: float) -> float:
    """Turns a uniform number into a bell-shaped one in (-width, width)."""
    t = 2 * number - 1
    return width * t * (0.35 + 0.65 * abs(t))


def take(
    canvas: np.ndarray, centre: np.ndarray, how: dict[str, float], difficulty: Difficulty, noise: np.ndarray
) -> np.ndarray:
    """The photograph of a drawn face, uint8 RGB [112, 112, 3].

    Args:
        canvas: the face, uint8 RGB [112, 112, 3].
        centre: of the head, pixels (x, y).
        how: numbers of the image, from 0 to 1, by name.
        difficulty: how much they change it.
        noise: uint8 [112 * 112 * 3], of the sensor.
    """
    nuisance, light = difficulty.nuisance, difficulty.light
    x = (_GRID_X - np.float32(centre[0])) * np.float32(1 / 46)
    y = (_GRID_Y - np.float32(centre[1])) * np.float32(1 / 60)
    z = np.sqrt(np.maximum(1 - x * x - y * y, 0.04))
    lamp = np.array([bell(how["light x"], 1.3), bell(how["light y"], 0.9) - 0.25, 1.0])
    lamp = (lamp / np.linalg.norm(lamp)).astype(np.float32)
    lambert = np.maximum(x * lamp[0] + y * lamp[1] + z * lamp[2], 0)
    strength = np.float32(min(span(how["light strength"], 0.25, 0.75) * light, 0.85))
    shade = (1 - strength) + strength * 1.25 * lambert
    exposure = 1 + bell(how["exposure"], 0.45 * light)
    warmth, tint = bell(how["warmth"], 0.24 * light), bell(how["tint"], 0.10 * light)
    gain = (exposure * np.array([1 + warmth, 1 + tint, 1 - warmth])).astype(np.float32)
    # one plane per channel: numpy is slow where the innermost axis has length three
    picture = canvas.transpose(2, 0, 1).astype(np.float32, order="C")
    picture *= shade
    picture *= gain[:, None, None]
    grey = np.array([0.299, 0.587, 0.114], dtype=np.float32) @ picture.reshape(3, -1)
    grey = grey.reshape(SIZE, SIZE)
    saturation = 0.0 if how["saturation"] < 0.06 * light else span(how["saturation"], 0.6, 1.25)
    picture -= grey
    picture *= np.float32(saturation)
    picture += grey
    picture -= 110
    picture *= np.float32(1 + bell(how["contrast"], 0.4 * light))
    picture += 110
    picture = cv2.merge(list(picture))
    if how["resolution"] < 0.25 * nuisance:
        small = round(SIZE * span(how["resolution"] / (0.25 * nuisance), 0.25, 0.7))
        picture = cv2.resize(picture, (small, small), interpolation=cv2.INTER_AREA)
        picture = cv2.resize(picture, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
    sigma = 1.7 * nuisance * how["blur"] ** 2
    if sigma > 0.3:
        picture = cv2.GaussianBlur(picture, (0, 0), sigma)
    grain = _NORMAL.take(noise).reshape(SIZE, SIZE, 3)
    grain *= np.float32(span(how["noise"] ** 2, 1.0, 13.0 * nuisance))
    picture += grain
    return np.clip(np.rint(picture, out=picture), 0, 255, out=picture).astype(np.uint8)
