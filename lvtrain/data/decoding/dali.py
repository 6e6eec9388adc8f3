"""Decoding and augmenting with DALI: nvJPEG and kernels on a GPU (`mixed`), libjpeg-turbo on a CPU, one graph for both.

The pipeline reads no file and draws no number: it is fed JPEG bytes and all parameters of each sample. So it has no state
to save. After a sample that fails, a new pipeline is built, and the run continues.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn as dali_fn
from nvidia.dali import pipeline_def
from nvidia.dali import types as dali_types
from nvidia.dali.tensors import TensorCPU, TensorListCPU

from lvtrain.data.augment import Draws, View
from lvtrain.data.decoding import jpeg
from lvtrain.data.decoding.job import DecodedViews, DecodeSpec, Job
from lvtrain.data.decoding.pixels import Memory, mirror_and_normalise, normalise_on
from lvtrain.data.decoding.steps import apply_steps

fn: Any = dali_fn  # its type stubs are incomplete
types: Any = dali_types
MID_GREY = 128


class DaliBackend:
    """Turns jobs into normalised float32 views [m, 3, size, size], in order."""

    def __init__(self, spec: DecodeSpec) -> None:
        self._spec = spec
        self._check = jpeg.HeaderCheck(spec.stored_size)
        self._black = jpeg.black(*(spec.stored_size or [spec.image_size] * 2))
        self._flying: deque[Job] = deque()
        self._fed = 0
        self._on_gpu = spec.device.type == "cuda"
        self._device_id = (spec.device.index or 0) if self._on_gpu else None
        self._memory = Memory(keep=2 * (spec.depth + 1))
        self._probe: Any = None
        self._pipeline: Any = self._build()

    def submit(self, job: Job) -> None:
        for row, data in enumerate(job.encoded):
            problem = job.bad.get(row) or self._check.problem(data)
            if problem is not None:
                self._replace(job, row, problem)
        self._flying.append(job)
        try:
            self._feed(job)
        except RuntimeError as error:
            self._recover(error)

    def collect(self) -> DecodedViews:
        while True:
            try:
                outputs = self._pipeline.outputs()
                break
            except RuntimeError as error:
                self._recover(error)
        job = self._flying.popleft()
        # DALI's buffers are returned to DALI; the tensors returned here are torch's, in the order of torch's streams
        pixels = {view.name: torch.from_dlpack(output.as_tensor()) for view, output in zip(self._spec.views, outputs)}
        stepped = {name for name in pixels if _has_steps(job.draws[name])}
        if self._on_gpu:
            views = {name: images.clone() for name, images in pixels.items()}
            for name in stepped:
                views[name] = self._stepped(views[name], job.draws[name])
            torch.cuda.current_stream(self._spec.device).synchronize()
        else:
            views = {}
            for name, images in pixels.items():
                views[name] = self._memory.lend(len(images), 3, *images.shape[1:3])
                if name in stepped:
                    views[name].copy_(self._stepped(images, job.draws[name]))
                    continue
                mirror_and_normalise(images.numpy(), job.draws[name].flip, views[name])
        return DecodedViews(job, views)

    def _stepped(self, images: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Steps on uint8 [m, h, w, 3], which torch applies: normalised float32 [m, 3, h, w]."""
        planes = images.permute(0, 3, 1, 2).contiguous()
        if draws.flip is not None:
            mirrored = torch.from_numpy(draws.flip > 0).to(planes.device).view(-1, 1, 1, 1)
            planes = torch.where(mirrored, planes.flip(3), planes)
        return normalise_on(apply_steps(planes, draws.steps, draws.black), planes.device)

    def close(self) -> None:
        self._flying.clear()
        self._pipeline = self._probe = None

    def _feed(self, job: Job) -> None:
        self._pipeline.feed_input("encoded", _as_list(job.encoded))
        for view in self._spec.views:
            size, stored = self._spec.size(view), self._spec.stored_size
            for name, values in _inputs(job.draws[view.name], size, stored, self._on_gpu).items():
                self._pipeline.feed_input(f"{view.name}.{name}", values)
        self._fed += 1
        if self._fed >= self._spec.depth:  # the first call runs as many iterations as the queue is deep
            self._pipeline.schedule_run()

    def _replace(self, job: Job, row: int, problem: str) -> None:
        """Decodes the sample with another library; if that fails, it is black and marked bad."""
        rescued = None if row in job.bad else jpeg.rescue(job.encoded[row], self._spec.stored_size)
        if rescued is None:
            job.bad[row] = problem
        job.encoded[row] = rescued or self._black

    def _recover(self, error: RuntimeError) -> None:
        """A new pipeline after a failed sample. Each sample in flight is decoded alone first, so one result never depends on the others."""
        if all(job.probed for job in self._flying):
            raise error
        for job in self._flying:
            for row, data in enumerate(job.encoded):
                if row not in job.bad and not job.probed and not self._decodes(data):
                    self._replace(job, row, "cannot be decoded")
            job.probed = True
        self._pipeline = self._build()
        self._fed = 0
        for job in self._flying:
            self._feed(job)

    def _decodes(self, data: bytes) -> bool:
        if self._probe is None:
            self._probe = _decoder(
                batch_size=1,
                num_threads=1,
                device_id=self._device_id,
                prefetch_queue_depth=1,
                exec_dynamic=True,
                on_gpu=self._on_gpu,
            )
            self._probe.build()
        self._probe.feed_input("encoded", [np.frombuffer(data, dtype=np.uint8)])
        try:
            self._probe.run()
        except RuntimeError:
            self._probe = None
            return False
        return True

    def _build(self) -> Any:
        pipeline = graph_of(self._spec)
        pipeline.build()
        return pipeline


def graph_of(spec: DecodeSpec) -> Any:
    """The pipeline for `spec.device`, not built yet: for a GPU, too, it needs none until it is built."""
    on_gpu = spec.device.type == "cuda"
    return _graph(
        batch_size=spec.micro_batch,
        num_threads=spec.threads,
        device_id=(spec.device.index or 0) if on_gpu else None,
        prefetch_queue_depth=spec.depth,
        exec_dynamic=True,
        views=[
            (view.name, spec.size(view), sorted(_inputs(_example(view), 1, None, on_gpu)), _kind(view))
            for view in spec.views
        ],
        stored_size=spec.stored_size,
        on_gpu=on_gpu,
    )


def _as_list(encoded: list[bytes]) -> Any:
    """The batch as DALI's list type, which is faster than a list of arrays."""
    longest = max(map(len, encoded))
    if longest * len(encoded) > 4 * sum(map(len, encoded)):  # a few large ones among small ones
        return TensorListCPU([TensorCPU(np.frombuffer(data, dtype=np.uint8)) for data in encoded])
    # one array is faster still; decoders stop at the end-of-image marker, which every sample has (`jpeg.HeaderCheck`)
    rows = b"".join([data.ljust(longest, b"\0") for data in encoded])
    return TensorListCPU(np.frombuffer(rows, dtype=np.uint8).reshape(len(encoded), longest))


def _has_steps(draws: Draws) -> bool:
    return draws.steps is not None or draws.black is not None


def _kind(view: View) -> tuple[bool, bool]:
    """Whether a view's crop is bicubic, and whether torch finishes it (steps)."""
    draws = _example(view)
    return draws.crop_cubic is not None, _has_steps(draws)


def _example(view: View) -> Draws:
    from lvtrain.data.augment import draw

    return draw(view, 0, np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))


def _inputs(draws: Draws, size: int, stored_size: tuple[int, int] | None, on_gpu: bool) -> dict[str, np.ndarray]:
    """The graph's inputs for a view of `size` pixels: arrays with one row per sample, in DALI's terms."""
    fed: dict[str, np.ndarray] = {}
    crop = draws.crop if draws.crop_cubic is None else draws.crop_cubic
    if crop is not None:
        shares = crop[:, [1, 0, 3, 2]]
        if stored_size is not None:  # whole pixels, as the torch backend takes them
            pixels = np.array(stored_size * 2, dtype=np.float32)
            shares = np.rint(shares * pixels)
            shares[:, 2:] = np.maximum(shares[:, 2:], shares[:, :2] + 1)
            shares = shares / pixels
        fed["crop_start"] = np.ascontiguousarray(shares[:, :2])
        fed["crop_end"] = np.ascontiguousarray(shares[:, 2:])
    if draws.flip is not None and on_gpu and not _has_steps(draws):
        fed["flip"] = draws.flip
    if draws.affine is not None:
        fed["affine"] = pixel_matrix(draws.affine, size)
    if draws.colour is not None:
        for column, name in enumerate(("brightness", "contrast", "saturation", "hue")):
            fed[name] = np.ascontiguousarray(draws.colour[:, column])
    if draws.posterise is not None:
        fed["posterise"] = draws.posterise
    if draws.solarise is not None:
        fed["solarise"] = draws.solarise
    if draws.down is not None:
        fed["down"] = draws.down > 0
        fed["down_size"] = down_size(draws.down, size).astype(np.float32)
    if draws.blur is not None:
        fed["blur"] = draws.blur > 0
        fed["sigma"] = np.where(draws.blur > 0, draws.blur, np.float32(1.0))
    if draws.erase is not None:
        pixels = np.rint(draws.erase * np.float32(size))
        fed["erase_start"] = np.ascontiguousarray(pixels[:, :2])
        fed["erase_shape"] = np.ascontiguousarray(pixels[:, 2:])
    return fed


def pixel_matrix(affine: np.ndarray, size: int) -> np.ndarray:
    """`Draws.affine` in pixels with the origin in the corner, float32 [k, 2, 3], output to input."""
    centre = np.full(2, size / 2)
    linear = affine[:, :, :2].astype(np.float64)
    shift = affine[:, :, 2] * size + centre - linear @ centre
    return np.concatenate([linear, shift[:, :, None]], axis=2).astype(np.float32)


def down_size(down: np.ndarray, size: int) -> np.ndarray:
    """Pixels per side of the reduced image, int [k]; the full size if nothing is done."""
    return np.where(down > 0, np.maximum(1, np.rint(down * size)), size).astype(np.int64)


def _decode(on_gpu: bool) -> Any:
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    if not on_gpu:
        return fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
    # The hardware decoder handles a share of each batch and rounds differently: pixels would depend on the rest of the batch.
    # Fancy upsampling of the colours is what libjpeg does, on a CPU and in Pillow.
    return fn.decoders.image(
        encoded, device="mixed", output_type=types.RGB, hw_decoder_load=0.0, jpeg_fancy_upsampling=True
    )


@pipeline_def
def _decoder(on_gpu: bool) -> Any:
    return _decode(on_gpu)


@pipeline_def(enable_conditionals=True)
def _graph(views: Any, stored_size: Any, on_gpu: bool) -> Any:
    image = _decode(on_gpu)
    outputs = []
    for name, size, inputs, (cubic, stepped) in views:
        outputs.append(_view(image, name, size, inputs, stored_size, on_gpu and not stepped, cubic))
    return tuple(outputs)


def _view(image: Any, name: str, size: int, inputs: list[str], stored_size: Any, floats: bool, cubic: bool) -> Any:
    fed = {key: fn.external_source(name=f"{name}.{key}") for key in inputs}
    if "crop_start" in fed:
        interpolation = {"interp_type": types.INTERP_CUBIC} if cubic else {}
        image = fn.resize(
            image,
            size=[size, size],
            roi_start=fed["crop_start"],
            roi_end=fed["crop_end"],
            roi_relative=True,
            **interpolation,
        )
    elif stored_size != (size, size):
        image = fn.resize(image, size=[size, size])
    if "affine" in fed:
        image = fn.warp_affine(image, matrix=fed["affine"], fill_value=MID_GREY, inverse_map=True)
    if "hue" in fed:
        image = fn.color_twist(
            image, brightness=fed["brightness"], contrast=fed["contrast"], saturation=fed["saturation"], hue=fed["hue"]
        )
    if "posterise" in fed:
        image = image & fed["posterise"]
    if "solarise" in fed:
        inverted = fn.cast(image >= fed["solarise"], dtype=types.UINT8)
        image = image ^ (inverted * types.Constant(255).uint8())
    if "down" in fed:
        image = _down(image, fed["down"], fed["down_size"], size)
    if "blur" in fed:
        image = _blur(image, fed["blur"], fed["sigma"])
    if "erase_start" in fed:
        image = fn.erase(
            image, anchor=fed["erase_start"], shape=fed["erase_shape"], axis_names="WH", fill_value=MID_GREY
        )
    if not floats:
        return image
    mirror = fed.get("flip", 0)
    return fn.crop_mirror_normalize(
        image, dtype=types.FLOAT, mean=[127.5] * 3, std=[127.5] * 3, mirror=mirror, output_layout="CHW"
    )


def _down(image: Any, here: Any, small: Any, size: int) -> Any:
    if here:
        less = fn.resize(image, resize_x=small, resize_y=small)
        result = fn.resize(less, size=[size, size])
    else:
        result = image
    return result


def _blur(image: Any, here: Any, sigma: Any) -> Any:
    if here:
        result = fn.gaussian_blur(image, sigma=sigma)
    else:
        result = image
    return result
