"""What passes between the loader and a decoding backend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lvtrain.data.augment import Draws

if TYPE_CHECKING:
    import torch


@dataclass
class Job:
    """One micro-batch to decode.

    Attributes:
        ids, labels: int64 [m].
        encoded: JPEG bytes [m].
        draws: parameters by view name.
        bad: row -> what is wrong with it; backends add to it.
        probed: each of its samples has been decoded once by itself.
    """

    ids: np.ndarray
    labels: np.ndarray
    encoded: list[bytes]
    draws: dict[str, Draws]
    bad: dict[int, str] = field(default_factory=dict)
    probed: bool = False


@dataclass
class Decoded:
    """A job's views, float32 [m, 3, size, size] in [-1, 1], on the device; rows in `job.bad` are to be ignored."""

    job: Job
    views: dict[str, torch.Tensor]


class Backend(Protocol):
    def submit(self, job: Job) -> None: ...

    def collect(self) -> Decoded: ...

    def close(self) -> None: ...
