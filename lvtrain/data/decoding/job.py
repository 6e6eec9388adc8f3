"""What passes between the loader and a decoding backend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lvtrain.data.augment import Draws, View

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DecodeSpec:
    """What a backend makes of every job, and with which resources.

    Attributes:
        views: made of each image, in this order; `image_size` pixels a side where a view does not fix its own.
        stored_size: (height, width) of the images in the shards, None if they differ.
        micro_batch: images a job.
        threads: that decode.
        depth: jobs that are submitted before the first is collected.
    """

    views: tuple[View, ...]
    image_size: int
    stored_size: tuple[int, int] | None
    micro_batch: int
    device: torch.device
    threads: int
    depth: int

    def size(self, view: View) -> int:
        return view.size or self.image_size


@dataclass
class Job:
    """One micro-batch to decode.

    Attributes:
        ids: of the samples, int64 `[m]`.
        labels: of the samples, int64 `[m]`.
        encoded: JPEG bytes [m].
        draws: parameters by view name.
        bad: row -> what is wrong with it; backends add to it.
        probed: each of its samples has been decoded once alone.
    """

    ids: np.ndarray
    labels: np.ndarray
    encoded: list[bytes]
    draws: dict[str, Draws]
    bad: dict[int, str] = field(default_factory=dict)
    probed: bool = False


@dataclass
class DecodedViews:
    """A job's views, float32 [m, 3, size, size] in [-1, 1], on the device; rows in `job.bad` are to be ignored."""

    job: Job
    views: dict[str, torch.Tensor]


class Backend(Protocol):
    """A decoder of jobs. `collect` returns the oldest job that was submitted."""

    def submit(self, job: Job) -> None: ...

    def collect(self) -> DecodedViews: ...

    def close(self) -> None: ...
