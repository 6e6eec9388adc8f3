"""Decodes with libjpeg-turbo (`simplejpeg`) and augments with torchvision on a CPU: DALI's order and parameters without DALI.

For a GPU the batch is copied as bytes and normalised there.
"""

from __future__ import annotations

import math
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import cv2
import numpy as np
import simplejpeg
import torch

from lvtrain.data.decoding import jpeg
from lvtrain.data.decoding.job import DecodedViews, DecodeSpec, Job
from lvtrain.data.decoding.pixels import TOGETHER, Memory, mirror, normalise, normalise_on, scratch, split
from lvtrain.data.decoding.steps import apply_steps
from lvtrain.data.images import try_decode

MID_GREY = 128

# the matrices with which DALI turns hue and saturation
_RGB_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_YIQ_TO_RGB = torch.tensor([[1.0, 0.956, 0.621], [1.0, -0.272, -0.647], [1.0, -1.107, 1.705]])


class TorchBackend:
    """Turns jobs into normalised float32 views, in order.

    Each thread of a pool handles some samples. The decoder releases the interpreter lock.
    """

    def __init__(self, spec: DecodeSpec) -> None:
        self._spec = spec
        self._check = jpeg.HeaderCheck(spec.stored_size)
        kind = spec.device.type
        self._floats_here = kind == "cpu"
        self._memory = Memory(
            keep=2 * (spec.depth + 1), dtype=torch.float32 if self._floats_here else torch.uint8, pinned=kind == "cuda"
        )
        self._pool = ThreadPoolExecutor(spec.threads, thread_name_prefix="decode")
        self._flying: deque[tuple[DecodedViews, list[Future[None]]]] = deque()

    def submit(self, job: Job) -> None:
        count = len(job.ids)
        views = {view.name: self._memory.lend(count, 3, *[self._spec.size(view)] * 2) for view in self._spec.views}
        share = math.ceil(count / self._spec.threads)  # a task for each image would cost more than reading it
        parts = [
            self._pool.submit(self._part, job, range(start, min(start + share, count)), views)
            for start in range(0, count, share)
        ]
        self._flying.append((DecodedViews(job, views), parts))

    def collect(self) -> DecodedViews:
        decoded, parts = self._flying.popleft()
        for part in parts:
            part.result()
        if self._floats_here:
            return decoded
        views = {name: normalise_on(planes, self._spec.device) for name, planes in decoded.views.items()}
        return DecodedViews(decoded.job, views)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._flying.clear()

    def _part(self, job: Job, rows: range, views: dict[str, torch.Tensor]) -> None:
        """Fills `rows` of the job's views."""
        for start in range(rows.start, rows.stop, TOGETHER):
            few = slice(start, min(start + TOGETHER, rows.stop))
            images = self._decode(job, few)
            for view in self._spec.views:
                draws = {name: values[few] for name, values in job.draws[view.name].arrays().items()}
                self._view(images, self._spec.size(view), draws, views[view.name][few])

    def _view(self, images: list[np.ndarray], size: int, draws: dict[str, np.ndarray], batch: torch.Tensor) -> None:
        planes = scratch("planes", len(images), 3, size, size) if self._floats_here else batch.numpy()
        if draws.keys() <= {"flip"} and all(image.shape[:2] == (size, size) for image in images):
            mirror(images, draws.get("flip"), planes)
        else:
            for row, image in enumerate(images):
                own = {name: values[row] for name, values in draws.items()}
                planes[row] = apply(_planes(image), size, own).numpy()
            if "steps" in draws or "black" in draws:
                planes[:] = apply_steps(torch.from_numpy(planes), draws.get("steps"), draws.get("black")).numpy()
        if self._floats_here:
            normalise(planes, batch)

    def _decode(self, job: Job, rows: slice) -> list[np.ndarray]:
        """uint8 [h, w, 3] each; what cannot be decoded is marked bad and is black."""
        stored = self._spec.stored_size
        room = scratch("decoded", TOGETHER, *stored, 3) if stored else [None] * TOGETHER
        encoded, numbers = job.encoded[rows], range(rows.start, rows.stop)
        # all headers first: alternating with decoding makes threads compete for the interpreter and its caches
        problems = [job.bad.get(row) or self._check.problem(data) for row, data in zip(numbers, encoded)]
        images: list[np.ndarray] = []
        for row, data, into, problem in zip(numbers, encoded, room, problems):
            image = None
            if problem is None:
                try:
                    image = simplejpeg.decode_jpeg(data, buffer=into)
                except ValueError:
                    problem = "cannot be decoded"
            images.append(self._rescue(job, row, str(problem)) if image is None else image)
        return images

    def _rescue(self, job: Job, row: int, problem: str) -> np.ndarray:
        stored = self._spec.stored_size
        image = None if row in job.bad else try_decode(job.encoded[row], stored)
        if image is None:
            job.bad[row] = problem
            image = np.zeros((*(stored or [self._spec.image_size] * 2), 3), dtype=np.uint8)
        return image


def _planes(image: np.ndarray) -> torch.Tensor:
    """uint8 [h, w, 3] to [3, h, w]."""
    planes = np.empty((3, *image.shape[:2]), np.uint8)
    split(image, planes)
    return torch.from_numpy(planes)


def apply(image: torch.Tensor, size: int, draws: dict[str, np.ndarray]) -> torch.Tensor:
    """One sample's parameters (a row of `Draws`) on uint8 [3, h, w] -> uint8 [3, size, size]."""
    from torchvision.transforms.v2 import functional

    if "crop" in draws or "crop_cubic" in draws:
        cubic = "crop_cubic" in draws
        image = _crop(image, draws["crop_cubic" if cubic else "crop"], size, cubic)
    elif image.shape[1:] != (size, size):
        image = functional.resize(image, [size, size], antialias=True)
    if "affine" in draws and not np.array_equal(draws["affine"], np.eye(2, 3, dtype=np.float32)):
        image = _warp(image, draws["affine"])
    if "colour" in draws:
        image = _twist(image, *draws["colour"].tolist())
    if "posterise" in draws:
        image = image & int(draws["posterise"])
    if draws.get("solarise", 256) < 256:
        image = torch.where(image >= int(draws["solarise"]), 255 - image, image)
    if draws.get("down", 0) > 0:
        small = max(1, round(float(draws["down"] * size)))
        image = functional.resize(
            functional.resize(image, [small, small], antialias=True), [size, size], antialias=True
        )
    if draws.get("blur", 0) > 0:
        image = _blur(image, float(draws["blur"]))
    if "erase" in draws and draws["erase"][2] > 0:
        x, y, width, height = (round(float(share) * size) for share in draws["erase"])
        image = image.clone()
        image[:, y : y + height, x : x + width] = MID_GREY
    if draws.get("flip"):
        image = image.flip(2)
    return image


def _crop(image: torch.Tensor, box: np.ndarray, size: int, cubic: bool) -> torch.Tensor:
    from torchvision.transforms.v2 import InterpolationMode, functional

    height, width = image.shape[1:]
    left, right = round(float(box[0]) * width), round(float(box[2]) * width)
    top, bottom = round(float(box[1]) * height), round(float(box[3]) * height)
    mode = InterpolationMode.BICUBIC if cubic else InterpolationMode.BILINEAR
    place = (top, left, max(1, bottom - top), max(1, right - left))
    return functional.resized_crop(image, *place, [size, size], mode, antialias=True)


def _warp(image: torch.Tensor, affine: np.ndarray) -> torch.Tensor:
    # grid_sample counts from -1 to 1 where `affine` counts from -1/2 to 1/2: the shift doubles
    theta = torch.from_numpy(affine * np.array([1, 1, 2], dtype=np.float32))[None]
    grid = torch.nn.functional.affine_grid(theta, [1, 3, *image.shape[1:]], align_corners=False)
    shifted = image[None].to(torch.float32) - MID_GREY
    warped = torch.nn.functional.grid_sample(shifted, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (warped[0] + MID_GREY).round_().clamp_(0, 255).to(torch.uint8)


def _blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    # OpenCV does in floats what torchvision does, in a sixth of the time
    side = 2 * math.ceil(3 * sigma) + 1
    planes = [cv2.GaussianBlur(plane.astype(np.float32), (side, side), sigma) for plane in image.numpy()]
    return torch.from_numpy(np.rint(planes).astype(np.uint8))


def _twist(image: torch.Tensor, brightness: float, contrast: float, saturation: float, hue: float) -> torch.Tensor:
    if (brightness, contrast, saturation, hue) == (1.0, 1.0, 1.0, 0.0):
        return image
    turn = math.radians(hue)
    cosine, sine = saturation * math.cos(turn), saturation * math.sin(turn)
    colour = torch.tensor([[1.0, 0.0, 0.0], [0.0, cosine, sine], [0.0, -sine, cosine]])
    matrix = _YIQ_TO_RGB @ colour @ _RGB_TO_YIQ * (brightness * contrast)
    offset = torch.tensor(brightness * (128 - 128 * contrast))
    turned = torch.addmm(offset, matrix, image.to(torch.float32).flatten(1))
    return turned.round_().clamp_(0, 255).to(torch.uint8).view_as(image)
