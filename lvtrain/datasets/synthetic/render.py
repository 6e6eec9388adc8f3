"""Draws a generated face: polygons on an ellipsoid head that turns, before a background.

The unit is half the width of an average head. x points right, y down, z towards the camera; the origin lies between eyes
and mouth. The eyes of an average frontal face are near (38, 52) and (74, 52) of 112 x 112 pixels, as in the five-point
template that real datasets are aligned to.
"""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np

from lvtrain.datasets.synthetic.camera import SIZE, bell, span, take
from lvtrain.datasets.synthetic.faces import Difficulty, identity_numbers, image_numbers, noise_bytes

_PIXELS = 38.5  # pixels per unit
_CENTRE = (56.0, 57.0)
_SHIFT = 4  # sub-pixel bits of cv2's polygons
_ANGLES = np.linspace(0, 2 * np.pi, 28, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
_SKIN = np.array(
    [(250, 222, 200), (238, 198, 168), (222, 172, 136), (190, 136, 98), (140, 92, 62), (88, 56, 40)], dtype=float
)
_HAIR = np.array(
    [(28, 24, 24), (62, 40, 26), (112, 70, 38), (150, 66, 30), (196, 150, 84), (226, 204, 160), (150, 150, 152)],
    dtype=float,
)
_IRIS = np.array(
    [(58, 36, 20), (110, 72, 34), (96, 112, 50), (60, 130, 96), (70, 120, 170), (130, 150, 165)], dtype=float
)


def _palette(table: np.ndarray, number: float) -> np.ndarray:
    position = min(max(number, 0.0), 0.9999) * (len(table) - 1)
    low = int(position)
    return table[low] + (table[low + 1] - table[low]) * (position - low)


def _hue(number: float, shade: float, strength: float = 0.6) -> np.ndarray:
    """An RGB colour from a hue circle; shade 0 dark to 1 light."""
    phases = 2 * np.pi * (number + np.array([0.0, 1 / 3, 2 / 3]))
    return 255 * np.clip(span(shade, 0.12, 0.95) * (1 - strength / 2 + strength / 2 * np.cos(phases)), 0, 1)


class _Head:
    """The turned head: lifts points of the face plane onto the ellipsoid and projects them to pixels."""

    def __init__(
        self, width: float, yaw: float, pitch: float, roll: float, scale: float, centre: tuple[float, float]
    ) -> None:
        self.width = width
        cy, sy, cx, sx = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
        turn = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]]) @ np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        cr, sr = np.cos(roll), np.sin(roll)
        self.flat = np.array([[cr, -sr], [sr, cr]]) * (_PIXELS * scale)
        self.matrix = self.flat @ turn[:2]
        self.centre = np.array(centre)
        self.sideways, self.nodding = sy, sx

    def on_face(self, points: np.ndarray, lift: float | np.ndarray = 0.0) -> np.ndarray:
        """Pixels [n, 2] of points [n, 2] of the face plane, raised `lift` above the skin."""
        x, y = points[:, 0], points[:, 1]
        raised = np.empty((len(points), 3))
        raised[:, :2] = points
        inside = np.maximum(1 - (x / (1.12 * self.width)) ** 2 - (y / 1.75) ** 2, 0.0)
        raised[:, 2] = 0.95 * np.sqrt(inside) - 0.45 + lift
        return raised @ self.matrix.T + self.centre

    def outline(self, points: np.ndarray) -> np.ndarray:
        """Pixels of the silhouette, which a turn does not squeeze but whose jaw follows the nose."""
        y = np.minimum(points[:, 1], 2)
        shifted = np.array(points, dtype=float)
        shifted[:, 0] += self.sideways * (0.10 + 0.10 * np.maximum(y, 0))
        shifted[:, 1] += -self.nodding * (0.06 + 0.16 * np.maximum(y, -1))
        return shifted @ self.flat.T + self.centre


def _oval(width: float, height: float, x: float, y: float) -> np.ndarray:
    """An ellipse about (x, y), [28, 2]."""
    return _CIRCLE * np.array([width, height]) + np.array([x, y])


def _band(x: np.ndarray, top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """The outline of what lies between two curves over x."""
    return np.concatenate([np.stack([x, top], axis=1), np.stack([x, bottom], axis=1)[::-1]])


def _bounded(colour: np.ndarray) -> tuple[float, ...]:
    return tuple(min(max(float(value), 0.0), 255.0) for value in colour.tolist())


def _fill(canvas: np.ndarray, points: np.ndarray, colour: np.ndarray) -> None:
    fixed = np.rint(points * (1 << _SHIFT)).astype(np.int32)
    cv2.fillPoly(canvas, [fixed], _bounded(colour), cv2.LINE_AA, _SHIFT)


def _line(canvas: np.ndarray, points: np.ndarray, colour: np.ndarray, thickness: int, closed: bool = False) -> None:
    fixed = np.rint(points * (1 << _SHIFT)).astype(np.int32)
    cv2.polylines(canvas, [fixed], closed, _bounded(colour), thickness, cv2.LINE_AA, _SHIFT)


def render_face(
    seed: int, identity: int, image: int, difficulty: Difficulty, *, changed: Mapping[str, float] | None = None
) -> np.ndarray:
    """One image of one identity: uint8 RGB [112, 112, 3], a pure function of the arguments.

    `changed` replaces some of the identity's numbers, in [0, 1), to see what a number does to an image.
    """
    who = identity_numbers(seed, identity, difficulty) | dict(changed or {})
    how = image_numbers(seed, identity, image, difficulty)
    k = difficulty.nuisance
    head = _Head(
        span(who["face width"], 0.86, 1.10),
        yaw=np.radians(bell(how["yaw"], 46 * k)),
        pitch=np.radians(bell(how["pitch"], 26 * k)),
        roll=np.radians(bell(how["roll"], 16 * k)),
        scale=1 + bell(how["scale"], 0.13 * k),
        centre=(_CENTRE[0] + bell(how["dx"], 7 * k), _CENTRE[1] + bell(how["dy"], 7 * k)),
    )
    canvas = np.empty((SIZE, SIZE, 3), dtype=np.uint8)
    skin = _palette(_SKIN, who["skin tone"]) + (who["skin hue"] - 0.5) * np.array([14, -6, -22])
    hair = _palette(_HAIR, who["hair colour"]) * span(who["hair shade"], 0.75, 1.2)
    _background(canvas, how)
    _hair_behind(canvas, head, who, hair)
    _neck(canvas, head, skin, how)
    _skull(canvas, head, who, skin)
    _beard(canvas, head, who, skin, hair)
    _nose(canvas, head, who, skin)
    _mouth(canvas, head, who, how, skin)
    _eyes(canvas, head, who, how, skin)
    _brows(canvas, head, who, how, hair)
    _marks(canvas, head, who, skin)
    _hair_front(canvas, head, who, hair)
    _glasses(canvas, head, who, how)
    _occlusion(canvas, head, how, k)
    return take(canvas, head.centre, how, difficulty, noise_bytes(seed, identity, image, SIZE * SIZE * 3))


def _background(canvas: np.ndarray, how: dict[str, float]) -> None:
    canvas[:] = _hue(how["back hue"], how["back shade"], 0.5).astype(np.uint8)
    angle = np.pi * how["back angle"]
    across = np.array([np.cos(angle), np.sin(angle)])
    along = np.array([-across[1], across[0]])
    centre = SIZE * np.array([how["back x"], how["back y"]])
    half = span(how["back size"], 12, 60)
    corners = [centre + along * 160 * a + across * half * b for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    _fill(canvas, np.array(corners), _hue(how["back hue 2"], how["back shade 2"], 0.5))


def _contour(who: dict[str, float], width: float) -> np.ndarray:
    """The outline of skull and jaw in the face plane, [28, 2]."""
    cos, sin = _CIRCLE[:, 0], _CIRCLE[:, 1]
    lower = np.clip(sin, 0, 1)
    squareness = span(who["jaw"], 0.62, 1.0)
    x = width * np.sign(cos) * np.abs(cos) ** (1 - 0.45 * lower * squareness)
    bulge = 0.07 * (who["cheeks"] - 0.5) * np.exp(-((sin - 0.35) ** 2) / 0.05)
    x *= 1 - lower**2 * span(who["jaw"], 0.34, 0.04) + bulge
    y = np.where(sin > 0, sin * span(who["chin"], 1.18, 1.46), sin * span(who["forehead"], 1.22, 1.42))
    return np.stack([x, y], axis=1)


def _hair_behind(canvas: np.ndarray, head: _Head, who: dict[str, float], hair: np.ndarray) -> None:
    contour = _contour(who, head.width)
    volume = span(who["hair volume"], 0.02, 0.30)
    away = contour * np.array([1 + volume, 1 + volume])
    long = who["hair length"]
    bottom = away[:, 1] > 0
    if long < 0.45:  # short: nothing below the ears
        away[bottom] = contour[bottom] * np.array([0.9, 0.15 + 0.5 * long])
    else:
        away[bottom, 1] *= 1 + long * 0.6
        wide = np.maximum(np.abs(away[bottom, 0]), head.width * (0.6 + 0.55 * long))
        away[bottom, 0] = np.sign(away[bottom, 0]) * wide
    _fill(canvas, head.outline(away), hair * 0.82)


def _neck(canvas: np.ndarray, head: _Head, skin: np.ndarray, how: dict[str, float]) -> None:
    half = 0.52 * head.width
    neck = np.array([(-half, 0.8), (half, 0.8), (half * 1.1, 2.2), (-half * 1.1, 2.2)])
    _fill(canvas, head.outline(neck), skin * 0.78)
    shirt = np.array([(-2.2, 2.6), (-1.5, 1.72), (-0.55, 1.5), (0, 1.75), (0.55, 1.5), (1.5, 1.72), (2.2, 2.6)])
    _fill(canvas, head.outline(shirt), _hue(how["shirt hue"], how["shirt shade"], 0.8))


def _skull(canvas: np.ndarray, head: _Head, who: dict[str, float], skin: np.ndarray) -> None:
    size = span(who["ears"], 0.10, 0.24)
    for side in (-1, 1):
        _fill(canvas, head.outline(_oval(size * 0.75, size * 1.35, side * head.width * 1.0, 0.12)), skin * 0.9)
    _fill(canvas, head.outline(_contour(who, head.width)), skin)
    for side in (-1, 1):  # a flush on the cheeks, fainter on dark skin
        cheek = _CIRCLE * 0.2 + np.array([side * 0.52, 0.45])
        _fill(canvas, head.on_face(cheek), skin + np.array([8, -5, -5]) * who["cheeks"])


def _beard(canvas: np.ndarray, head: _Head, who: dict[str, float], skin: np.ndarray, hair: np.ndarray) -> None:
    mouth_y = span(who["mouth height"], 0.78, 1.0)
    if who["beard"] > 0.66:
        amount = (who["beard"] - 0.66) / 0.34
        contour = _contour(who, head.width)
        low = contour[contour[:, 1] > span(amount, 0.85, 0.25)]
        low = low[np.argsort(-np.arctan2(low[:, 1], low[:, 0]))]
        inner = np.array([(0.34, mouth_y - 0.16), (0.0, mouth_y - 0.12), (-0.34, mouth_y - 0.16)])
        _fill(canvas, head.outline(np.concatenate([low, inner]) * 0.99), skin * 0.35 + hair * 0.65)
        _fill(canvas, head.on_face(_oval(0.33, 0.14, 0, mouth_y)), skin * 0.97)
    if who["moustache"] > 0.7:
        w = span((who["moustache"] - 0.7) / 0.3, 0.24, 0.48)
        points = np.array([(-w, -0.02), (-w * 0.5, -0.17), (0, -0.13), (w * 0.5, -0.17), (w, -0.02), (0, -0.06)])
        _fill(canvas, head.on_face(points + np.array([0, mouth_y]), 0.05), hair * 0.9)


def _nose(canvas: np.ndarray, head: _Head, who: dict[str, float], skin: np.ndarray) -> None:
    tip_y = span(who["nose length"], 0.34, 0.64)
    w = span(who["nose width"], 0.12, 0.29)
    rise = span(who["nose tip"], 0.16, 0.42)
    right = [(0.05, -0.12), (w * 0.6, tip_y - 0.14), (w, tip_y), (0, tip_y + 0.07)]
    side = np.array([(-0.05, -0.12), *right, (-w, tip_y), (-w * 0.6, tip_y - 0.14)])
    lift = np.array([0.04, 0.04, rise * 0.7, rise * 0.35, rise * 0.7, rise * 0.35, rise * 0.7])
    _fill(canvas, head.on_face(side, lift), skin * 0.88)
    ridge = np.array([(-0.03, -0.1), (0.03, -0.1), (w * 0.4, tip_y - 0.05), (-w * 0.4, tip_y - 0.05)])
    _fill(canvas, head.on_face(ridge, np.array([0.05, 0.05, rise, rise])), skin * 1.05)
    for x in (-0.55 * w, 0.55 * w):
        _fill(canvas, head.on_face(_oval(0.055, 0.035, x, tip_y)[::3], rise * 0.5), skin * 0.45)


def _mouth(canvas: np.ndarray, head: _Head, who: dict[str, float], how: dict[str, float], skin: np.ndarray) -> None:
    y = span(who["mouth height"], 0.78, 1.0)
    w = span(who["mouth width"], 0.27, 0.50) * (1 + 0.18 * how["smile"])
    smile = span(how["smile"], -0.05, 0.13)
    gap = max(0.0, how["mouth opening"] - 0.55) * 0.42
    upper, lower = span(who["upper lip"], 0.03, 0.11), span(who["lower lip"], 0.04, 0.14)
    t = np.linspace(-1, 1, 9)
    curve = y + smile * (0.5 - t**2)
    bow = (1 - t**2) * (1 + 0.25 * np.cos(3 * np.pi * t) * (np.abs(t) < 0.5))
    x = w * t
    lips = skin * 0.55 + np.array([190, 60, 70]) * 0.45 * span(who["lip colour"], 0.5, 1.15)
    _fill(canvas, head.on_face(_band(x, curve - upper * bow, curve + (lower + gap) * (1 - t**2)), 0.06), lips)
    if gap > 0.02:
        inside = _band(x * 0.9, curve, curve + gap * (1 - t**2))
        _fill(canvas, head.on_face(inside, 0.06), np.array([70, 22, 26]))
        teeth = _band(x * 0.75, curve, curve + min(gap, 0.07) * (1 - t**2))
        _fill(canvas, head.on_face(teeth, 0.06), np.array([236, 232, 222]))
    else:
        _line(canvas, head.on_face(np.stack([x, curve], axis=1), 0.06), lips * 0.55, 1)


def _eyes(canvas: np.ndarray, head: _Head, who: dict[str, float], how: dict[str, float], skin: np.ndarray) -> None:
    half, y = span(who["eye distance"], 0.40, 0.55), span(who["eye height"], -0.22, -0.02)
    w = span(who["eye width"], 0.15, 0.26)
    h = span(who["eye opening"], 0.06, 0.15) * (0.12 if how["blink"] > 0.95 else span(how["blink"], 1.15, 0.75))
    slant = bell(who["eye slant"], 0.07)
    iris, radius = _palette(_IRIS, who["iris"]), span(who["iris size"], 0.075, 0.11)
    gaze = np.array([bell(how["gaze x"], 0.07), bell(how["gaze y"], 0.03)])
    t = np.linspace(-1, 1, 9)
    for side in (-1, 1):
        x = side * half + w * t
        tilt = -side * slant * t
        top = y - h * (1 - t**2) + tilt
        almond = head.on_face(_band(x, top, y + 0.75 * h * (1 - t**2) + tilt), 0.02)
        _fill(canvas, head.on_face(_oval(w * 1.35, h + 0.10, side * half, y - 0.02)), skin * 0.93)
        low = np.clip(np.floor(almond.min(axis=0)).astype(int) - 1, 0, SIZE - 1)
        high = np.clip(np.ceil(almond.max(axis=0)).astype(int) + 2, 1, SIZE)
        if (high <= low).any():
            continue
        patch = canvas[low[1] : high[1], low[0] : high[0]]
        eye = patch.copy()
        eye[:] = (238, 236, 232)
        centre = np.array([side * half, y]) + gaze
        _fill(eye, head.on_face(_CIRCLE * radius + centre, 0.03) - low, iris)
        _fill(eye, head.on_face(_CIRCLE[::2] * radius * 0.5 + centre, 0.03) - low, np.array([12, 10, 10]))
        glint = head.on_face(_CIRCLE[::3] * radius * 0.22 + centre + np.array([0.03, -0.03]), 0.03)
        _fill(eye, glint - low, np.array([250, 250, 250]))
        mask = np.zeros(patch.shape[:2], dtype=np.uint8)
        cv2.fillPoly(mask, [np.rint((almond - low) * (1 << _SHIFT)).astype(np.int32)], 255, cv2.LINE_AA, _SHIFT)
        weight = mask[:, :, None].astype(np.uint16)
        patch[:] = ((eye * weight + patch * (255 - weight) + 127) // 255).astype(np.uint8)
        _line(canvas, head.on_face(np.stack([x, top], axis=1), 0.03), skin * 0.28, 1)


def _brows(canvas: np.ndarray, head: _Head, who: dict[str, float], how: dict[str, float], hair: np.ndarray) -> None:
    half = span(who["eye distance"], 0.40, 0.55)
    y = span(who["eye height"], -0.22, -0.02) - span(who["brow height"], 0.18, 0.34) - bell(how["brow raise"], 0.07)
    thick = span(who["brow thickness"], 0.025, 0.10)
    slant, arch = bell(who["brow slant"], 0.11), span(who["brow arch"], -0.02, 0.12)
    t = np.linspace(-1, 1, 7)
    for side in (-1, 1):
        x = side * half + 0.28 * t
        line = y - arch * (1 - t**2) + side * slant * t
        taper = thick * (0.45 + 0.55 * (1 - np.clip(side * t, 0, 1)))
        _fill(canvas, head.on_face(_band(x, line - taper / 2, line + taper / 2), 0.04), hair * 0.72)


def _marks(canvas: np.ndarray, head: _Head, who: dict[str, float], skin: np.ndarray) -> None:
    if who["mole"] > 0.55:
        place = np.array([span(who["mole x"], -0.75, 0.75), span(who["mole y"], 0.05, 1.1)])
        _fill(canvas, head.on_face(_CIRCLE[::2] * 0.045 + place, 0.01), skin * 0.35)
    if who["freckles"] > 0.7:
        for number in range(14):
            side = -1 if number % 2 else 1
            place = np.array([side * (0.28 + 0.045 * (number * 5 % 7)), 0.22 + 0.05 * (number * 3 % 7)])
            _fill(canvas, head.on_face(_CIRCLE[::7] * 0.022 + place), skin * 0.72)


def _hair_front(canvas: np.ndarray, head: _Head, who: dict[str, float], hair: np.ndarray) -> None:
    if who["hair line"] > 0.92:  # bald: only what is behind
        return
    contour = _contour(who, head.width)
    top = contour[contour[:, 1] < -0.25]
    top = top[np.argsort(np.arctan2(top[:, 1], top[:, 0]))] * (1 + span(who["hair volume"], 0.02, 0.26))
    line = span(who["hair line"], -0.62, -1.08)
    fringe, part = who["fringe"], span(who["parting"], -0.6, 0.6)
    t = np.linspace(0.92, -0.92, 13)
    if fringe < 0.35:  # swept to both sides of the parting
        y = line - 0.30 * np.exp(-((t - part) ** 2) / 0.12) + 0.45 * np.abs(t) ** 3
    elif fringe < 0.7:  # a straight or slanted fringe
        y = line + 0.22 + 0.16 * t * np.sign(part) + 0.3 * np.abs(t) ** 4
    else:  # spiky
        y = line + 0.12 * np.where(np.arange(13) % 2, -1, 1) + 0.35 * np.abs(t) ** 4
    edge = head.on_face(np.stack([t * head.width, y], axis=1), 0.06)
    _fill(canvas, np.concatenate([head.outline(top), edge]), hair)
    if who["hair length"] > 0.45:  # strands in front of the ears
        length = span((who["hair length"] - 0.45) / 0.55, 0.3, 1.7)
        for side in (-1, 1):
            strand = np.array([(0.80, -0.75), (1.12, -0.7), (1.2, length), (0.96, length), (0.9, 0.1)]) * [side, 1]
            _fill(canvas, head.outline(strand * np.array([head.width, 1])), hair * 0.93)


def _glasses(canvas: np.ndarray, head: _Head, who: dict[str, float], how: dict[str, float]) -> None:
    """Draws glasses. Some identities wear them in most images, others sometimes."""
    wears = who["glasses"] > 0.75
    if (how["glasses worn"] > 0.85) == wears:
        return
    half, y = span(who["eye distance"], 0.40, 0.55), span(who["eye height"], -0.22, -0.02)
    power = span(who["glasses shape"], 0.35, 1.0)
    round_ = np.sign(_CIRCLE) * np.abs(_CIRCLE) ** power
    colour = _hue(who["glasses colour"], 0.25 + 0.3 * who["glasses shape"], 0.7)
    for side in (-1, 1):
        rim = round_ * np.array([0.34, 0.25]) + np.array([side * half, y + 0.03])
        _line(canvas, head.on_face(rim, 0.12), colour, 2, closed=True)
        _line(canvas, head.on_face(np.array([(side * (half + 0.34), y), (side * 1.0, y - 0.04)]), 0.1), colour, 2)
    _line(canvas, head.on_face(np.array([(-half + 0.34, y), (half - 0.34, y)]), 0.2), colour, 2)


def _occlusion(canvas: np.ndarray, head: _Head, how: dict[str, float], nuisance: float) -> None:
    """Covers part of the face in a quarter of the images: hand, object, dark glasses, mask or cap."""
    if how["occlusion"] > 0.25 * nuisance:
        return
    colour = _hue(how["occlusion colour"], how["occlusion shade"], 0.6)
    kind = how["occlusion kind"]
    if kind < 0.55:
        centre = np.array([span(how["occlusion x"], -1.1, 1.1), span(how["occlusion y"], -1.2, 1.4)])
        size = np.array([span(how["occlusion width"], 0.2, 0.55), span(how["occlusion height"], 0.2, 0.55)])
        box = np.sign(_CIRCLE) * np.abs(_CIRCLE) ** 0.5 * size + centre
        _fill(canvas, head.outline(box), colour)
    elif kind < 0.7:
        for side in (-1, 1):
            _fill(canvas, head.on_face(_oval(0.38, 0.26, side * 0.47, -0.1), 0.12), colour * 0.35)
        _line(canvas, head.on_face(np.array([(-1.0, -0.16), (1.0, -0.16)]), 0.14), colour * 0.3, 2)
    elif kind < 0.85:
        mask = [(-0.85, 0.35), (0, 0.22), (0.85, 0.35), (0.75, 1.0), (0.35, 1.35), (-0.35, 1.35), (-0.75, 1.0)]
        _fill(canvas, head.on_face(np.array(mask), 0.12), np.clip(colour * 1.3, 0, 240))
    else:
        cap = [(-1.15, -0.62), (-1.1, -1.2), (-0.6, -1.7), (0.6, -1.7), (1.1, -1.2), (1.15, -0.62), (0, -0.78)]
        _fill(canvas, head.outline(np.array(cap)), colour)
        peak = [(-0.8, -0.78), (0.8, -0.78), (0.7, -0.55), (0, -0.48), (-0.7, -0.55)]
        _fill(canvas, head.on_face(np.array(peak), 0.45), colour * 0.75)
