"""Images through a model on all ranks, in order.

Two rules:

- Every rank makes the same number of forward calls, because a ZeRO-3 forward is a collective.
- Image i is in the same padded batch on any number of ranks. So embeddings are the same bits on 1, 2 or 64 ranks, if each has
  the same number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from lvtrain.data.images import ImageError, open_image
from lvtrain.distributed.world import World, gather_objects
from lvtrain.errors import UserError

Forward = Callable[[torch.Tensor], torch.Tensor]
Reduce = Callable[[np.ndarray], np.ndarray]
Progress = Callable[[int, int], None]
_DECODERS = 4
_GATHER_BYTES = 64 << 20


class Images(Protocol):
    """Encoded images (bytes), paths, uint8 RGB arrays [H, W, 3] or PIL images, by position, such as a list."""

    def __len__(self) -> int: ...
    def __getitem__(self, position: int, /) -> Any: ...


def decode(image: Any, image_size: int | None, name: str = "an image") -> np.ndarray:
    """uint8 RGB [image_size, image_size, 3] of an encoded image (bytes), a path, an RGB array or a PIL image.

    It is resized if it has another size, and left as it is where `image_size` is None.

    Raises:
        UserError: not an image, or one that is cut short; `name` says which, unless it is a path.
    """
    if isinstance(image, (str, Path)):
        name = str(image)
    try:
        if isinstance(image, np.ndarray):
            opened = Image.fromarray(image)
        elif isinstance(image, Image.Image):
            opened = image
        else:
            opened = open_image(image)
    except (ImageError, OSError) as error:
        raise UserError(f"{name} cannot be decoded: {error}; replace this image, or leave it out") from error
    opened = opened.convert("RGB")
    if image_size is not None and opened.size != (image_size, image_size):
        opened = opened.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(opened)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 of any shape to float32, (x - 127.5) / 127.5: what every model takes."""
    return pixels.to(torch.float32).sub_(127.5).div_(127.5)


def raw_pixels(images: torch.Tensor) -> torch.Tensor:
    """The baseline every model must beat: the pixels themselves are the embedding, [b, 3, H, W] -> [b, 3 H W]."""
    return images.flatten(1)


@dataclass(frozen=True)
class Setting:
    """How images are embedded, the same for every protocol of one evaluation.

    Attributes:
        world: rank and number of ranks; with more than one, the default process group is used.
        device: where `forward` expects its images.
        batch: images per forward call, always exactly this many (the last batch is padded).
        image_size: pixels of a side that the model takes.
        progress: called after each batch with the images embedded so far, of all ranks together, and their number.
        kept: the last set's embeddings, for the next protocol on the same set; None to keep none. Only for one forward function.
    """

    world: World
    device: torch.device | str
    batch: int = 128
    image_size: int = 112
    progress: Progress | None = None
    kept: dict[tuple[Path, bool], np.ndarray] | None = field(default=None, compare=False)

    def embed(self, forward: Forward, images: Images, *, mirror: bool = True) -> np.ndarray:
        """Embeddings, not normalised: float32 [N, d] on every rank, in order. A collective.

        Args:
            forward: takes float32 [b, 3, H, W], RGB, (x - 127.5) / 127.5, gives [b, d]; called under `no_grad`, with eval
                mode set by the caller.
            images: N images; see `Images`.
            mirror: also embed the mirror images, and add.

        Raises:
            UserError: an image that cannot be decoded (raised on all ranks alike), no images.
        """
        return self.run(forward, images, lambda views: views.sum(0), mirror=mirror)[: len(images)]

    def run(self, forward: Forward, images: Images, reduce: Reduce, *, mirror: bool = True) -> np.ndarray:
        """Embeds batch after batch, keeps `reduce(float32 [views, batch, d])` of each, gathers the rows of all batches in order on every rank.

        Only what `reduce` returns is stored and sent: pair distances need two numbers a pair, not two embeddings. Rows
        beyond the last image come from padding (repeats of the last image); the caller cuts them off. Else as `embed`.
        """
        count = len(images)
        if count == 0:
            raise UserError("there is no image to embed")
        batches = -(-count // self.batch)
        calls = -(-batches // self.world.size)
        mine = range(self.world.rank * calls, (self.world.rank + 1) * calls)
        rows: list[np.ndarray] = []
        problem: UserError | None = None
        with ThreadPoolExecutor(_DECODERS) as pool:

            def start(number: int) -> list[Any]:
                # the last batch is filled up with the last image; a rank without a batch repeats the last one, for its forward must run
                first = min(number, batches - 1) * self.batch
                return [
                    pool.submit(_load, images, min(i, count - 1), self.image_size)
                    for i in range(first, first + self.batch)
                ]

            pending = start(mine[0])
            for done, number in enumerate(mine, start=1):
                try:
                    pixels = np.stack([future.result() for future in pending])
                except UserError as error:
                    # every rank must still make its calls: continue with black images, and raise together below
                    problem = problem or error
                    pixels = np.zeros((self.batch, self.image_size, self.image_size, 3), dtype=np.uint8)
                if number + 1 in mine:
                    pending = start(number + 1)
                rows.append(reduce(_views(forward, pixels, self.device, mirror)))
                if self.progress is not None:
                    self.progress(min(done * self.batch * self.world.size, count), count)
        problem_text = str(problem) if problem else ""
        texts = [problem_text] if self.world.size == 1 else gather_objects(problem_text)
        failures = [text for text in texts if text]
        if failures:
            raise UserError(failures[0])
        return _gather_rows(np.concatenate(rows), self.world)


def _load(images: Images, position: int, image_size: int) -> np.ndarray:
    return decode(images[position], image_size, f"image {position} of the set")


def _views(forward: Forward, pixels: np.ndarray, device: torch.device | str, mirror: bool) -> np.ndarray:
    normalised = normalise(torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)).contiguous()
    with torch.no_grad():
        views = [forward(normalised).float()]
        if mirror:
            views.append(forward(normalised.flip(3)).float())
    return torch.stack(views).cpu().numpy()


def _gather_rows(rows: np.ndarray, world: World) -> np.ndarray:
    """Gathers the rows of all ranks (equally many), in rank order, on every rank. In slices, to use little device memory."""
    if world.size == 1:
        return rows
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    gathered = np.empty((world.size, *rows.shape), dtype=rows.dtype)
    step = max(1, _GATHER_BYTES // max(1, rows[0].nbytes))
    for first in range(0, len(rows), step):
        piece = torch.from_numpy(np.ascontiguousarray(rows[first : first + step])).to(device)
        pieces = [torch.empty_like(piece) for _ in range(world.size)]
        dist.all_gather(pieces, piece)
        for rank, received in enumerate(pieces):
            gathered[rank, first : first + step] = received.cpu().numpy()
    return gathered.reshape(-1, *rows.shape[1:])
