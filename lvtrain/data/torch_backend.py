"""Decoding and augmenting with torchvision, for machines without DALI: same order, same parameters, same interface, more CPU."""

from __future__ import annotations

import io
import math
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from lvtrain.data.augment import View
from lvtrain.data.job import Decoded, Job

MID_GREY = 128

# the matrices DALI turns hue and saturation with
_RGB_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_YIQ_TO_RGB = torch.tensor([[1.0, 0.956, 0.621], [1.0, -0.272, -0.647], [1.0, -1.107, 1.705]])


def decode(encoded: bytes) -> torch.Tensor:
    """JPEG bytes -> uint8 [3, height, width] RGB, turned upright by its EXIF; whatever torchvision does not know goes through Pillow.

    Raises:
        ValueError: nobody can read them.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        data = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        return decode_jpeg(data, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    except (RuntimeError, ValueError):
        return _decode_with_pillow(encoded)


def _decode_with_pillow(encoded: bytes) -> torch.Tensor:
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("RGB"))).permute(2, 0, 1)
    except Exception as error:  # Pillow raises many kinds: OSError, SyntaxError, DecompressionBombError, struct.error
        raise ValueError("cannot be decoded") from error


class TorchBackend:
    """Jobs in, normalised float32 views out, in order; samples are handled by a pool of threads (the decoder releases the interpreter lock)."""

    def __init__(self, views: tuple[View, ...], *, image_size: int, device: torch.device, threads: int) -> None:
        self.views, self.image_size, self.device = views, image_size, device
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._flying: deque[tuple[Job, list[Future[list[torch.Tensor] | str]]]] = deque()

    def submit(self, job: Job) -> None:
        self._flying.append((job, [self._pool.submit(self._sample, job, row) for row in range(len(job.ids))]))

    def collect(self) -> Decoded:
        job, futures = self._flying.popleft()
        views = [
            torch.zeros(len(futures), 3, *[view.size or self.image_size] * 2, dtype=torch.uint8) for view in self.views
        ]
        for row, future in enumerate(futures):
            images = future.result()
            if isinstance(images, str):
                job.bad.setdefault(row, images)
                continue
            for images_of_view, image in zip(views, images):
                images_of_view[row] = image
        return Decoded(job, {view.name: self._normalise(images) for view, images in zip(self.views, views)})

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._flying.clear()

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        return images.to(self.device).to(torch.float32).sub_(127.5).div_(127.5)

    def _sample(self, job: Job, row: int) -> list[torch.Tensor] | str:
        if row in job.bad:
            return job.bad[row]
        try:
            image = decode(job.encoded[row])
        except ValueError as error:
            return str(error)
        return [
            apply(
                image,
                view.size or self.image_size,
                {name: values[row] for name, values in job.draws[view.name].arrays().items()},
            )
            for view in self.views
        ]


def apply(image: torch.Tensor, size: int, draws: dict[str, np.ndarray]) -> torch.Tensor:
    """One sample's parameters (a row of `Draws`) on uint8 [3, h, w] -> uint8 [3, size, size]."""
    from torchvision.transforms.v2 import functional

    if "crop" in draws:
        image = _crop(image, draws["crop"], size)
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
        sigma = float(draws["blur"])
        image = functional.gaussian_blur(image, [2 * math.ceil(3 * sigma) + 1] * 2, [sigma, sigma])
    if "erase" in draws and draws["erase"][2] > 0:
        x, y, width, height = (round(float(share) * size) for share in draws["erase"])
        image = image.clone()
        image[:, y : y + height, x : x + width] = MID_GREY
    if draws.get("flip"):
        image = image.flip(2)
    return image


def _crop(image: torch.Tensor, box: np.ndarray, size: int) -> torch.Tensor:
    from torchvision.transforms.v2 import functional

    height, width = image.shape[1:]
    left, right = round(float(box[0]) * width), round(float(box[2]) * width)
    top, bottom = round(float(box[1]) * height), round(float(box[3]) * height)
    return functional.resized_crop(
        image, top, left, max(1, bottom - top), max(1, right - left), [size, size], antialias=True
    )


def _warp(image: torch.Tensor, affine: np.ndarray) -> torch.Tensor:
    # grid_sample counts from -1 to 1 where `affine` counts from -1/2 to 1/2: the shift doubles
    theta = torch.from_numpy(affine * np.array([1, 1, 2], dtype=np.float32))[None]
    grid = torch.nn.functional.affine_grid(theta, [1, 3, *image.shape[1:]], align_corners=False)
    shifted = image[None].to(torch.float32) - MID_GREY
    warped = torch.nn.functional.grid_sample(shifted, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (warped[0] + MID_GREY).round_().clamp_(0, 255).to(torch.uint8)


def _twist(image: torch.Tensor, brightness: float, contrast: float, saturation: float, hue: float) -> torch.Tensor:
    if (brightness, contrast, saturation, hue) == (1.0, 1.0, 1.0, 0.0):
        return image
    turn = math.radians(hue)
    cosine, sine = saturation * math.cos(turn), saturation * math.sin(turn)
    colour = torch.tensor([[1.0, 0.0, 0.0], [0.0, cosine, sine], [0.0, -sine, cosine]])
    matrix = _YIQ_TO_RGB @ colour @ _RGB_TO_YIQ * (brightness * contrast)
    offset = brightness * (128 - 128 * contrast)
    turned = torch.einsum("ij,jhw->ihw", matrix, image.to(torch.float32)) + offset
    return turned.round_().clamp_(0, 255).to(torch.uint8)
