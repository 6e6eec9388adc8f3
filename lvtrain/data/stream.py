"""Shards behind a URL or a pipe, read by the webdataset library one after the other. What that gives up is said in `GIVEN_UP`."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from lvtrain import randomness
from lvtrain.data.images import ImageError, decode, is_image_name
from lvtrain.errors import UserError

GIVEN_UP = (
    "a stream has no index: samples come in the order of the shards, shuffled only within a buffer; ranks and workers see different numbers of "
    "samples in an epoch; a loop that is started again begins an epoch anew; a stream that ends early between two samples is not noticed. "
    "For an exact order and an exact resume copy the dataset to a disk and open it with ShardDataset"
)

_log = logging.getLogger(__name__)


class StreamSample(NamedTuple):
    """One sample; torch's `DataLoader` collates them into batches of the same fields.

    Attributes:
        image: uint8 [3, S, S], RGB; zeros where it cannot be decoded.
        label: class id; -1 where the image cannot be decoded, which the classifier ignores.
        key: the sample's name in its shard.
    """

    image: torch.Tensor
    label: int
    key: str


class StreamDataset(IterableDataset[StreamSample]):
    """Shards behind a URL or a pipe, for a training loop of your own; the trainer takes datasets on a disk only (`ShardDataset`).

        stream = lvtrain.StreamDataset("https://host/faces/shards/{000000..000041}.tar", rank=rank, size=ranks)
        for images, labels, keys in torch.utils.data.DataLoader(stream, batch_size=64, num_workers=4): ...

    The shards are divided over the ranks, and a rank's over the workers of its `DataLoader`. It gives up what `GIVEN_UP` says, and says so when
    it is made.

    Args:
        urls: of the tars, each with an image and a `.cls` a sample: one or several; `{000000..000041}` is expanded. What webdataset opens:
            paths, `https:` (by curl), `pipe:COMMAND` (run by the shell, so never from an untrusted list).
        image_size: S; other sizes are resized (bilinear).
        shuffle: samples of the buffer that is drawn from; 0 keeps the order of the shards.
        seed: of the order of the shards and of the draws.
        rank: of this process.
        size: number of ranks.
        repeat: continue with the next epoch without end, so that all ranks can run the same number of steps.
        warn: called with a line: what a stream gives up, and each image that cannot be decoded. By default it is logged.

    Raises:
        UserError: fewer shards than ranks. While reading: a shard that cannot be opened or is cut short, or a sample without image or label.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        image_size: int = 112,
        shuffle: int = 1000,
        seed: int = 0,
        rank: int = 0,
        size: int = 1,
        repeat: bool = False,
        warn: Callable[[str], None] = _log.warning,
    ) -> None:
        from webdataset.shardlists import expand_urls

        self.urls: list[str] = [
            url for pattern in ([urls] if isinstance(urls, str) else urls) for url in expand_urls(pattern)
        ]
        if len(self.urls) < size:
            raise UserError(f"{len(self.urls)} shards cannot be divided over {size} ranks; pack into more shards")
        self.image_size, self.shuffle, self.seed, self.repeat = image_size, shuffle, seed, repeat
        self.rank, self.size, self.warn = rank, size, warn
        self.epoch = 0
        warn(f"reading {len(self.urls)} shards as a stream, {self.urls[0]} first: {GIVEN_UP}")

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration begins with; it decides the order of the shards and the draws."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[StreamSample]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        epoch = self.epoch
        while True:
            order = np.arange(len(self.urls))
            if self.shuffle:
                order = np.argsort(randomness.bits(self.seed, "stream/shards", epoch, order), kind="stable")
            mine = order[self.rank :: self.size][number::workers]
            yield from self._shuffled(self._read([self.urls[shard] for shard in mine.tolist()]), epoch, number)
            if not self.repeat or not len(mine):  # a worker without a shard has none in any epoch
                return
            epoch += 1

    def _shuffled(self, samples: Iterator[dict[str, Any]], epoch: int, worker: int) -> Iterator[StreamSample]:
        """Encoded samples are shuffled: they are smaller than decoded ones."""
        if self.shuffle:
            from webdataset.filters import shuffle

            draws = random.Random(randomness.torch_seed(self.seed, "stream/samples", epoch, self.rank, worker))
            samples = shuffle(self.shuffle, initial=self.shuffle, rng=draws)(samples)
        return map(self._decoded, samples)

    def _read(self, urls: list[str]) -> Iterator[dict[str, Any]]:
        from webdataset.tariterators import tarfile_to_samples

        for url in urls:
            try:
                yield from tarfile_to_samples()(iter([{"url": url}]))
            except Exception as error:  # of the file system, of curl or the pipe's command, of tarfile
                reason = " ".join(str(error.args[0] if error.args else error).split())[:200]
                raise UserError(
                    f"{url} cannot be read to its end ({reason}); check the address and the shard"
                ) from error

    def _decoded(self, sample: dict[str, Any]) -> StreamSample:
        key, url = str(sample["__key__"]), sample["__url__"]
        encoded = next((value for name, value in sample.items() if is_image_name(f"x.{name}")), None)
        label = sample.get("cls", b"").strip()
        if encoded is None or not label.isdigit():
            raise UserError(
                f"{url}: sample {key} has no image, or no class id in .cls; pack the dataset with tools/pack_dataset.py"
            )
        try:
            pixels = decode(encoded, (self.image_size, self.image_size))
        except ImageError as error:
            self.warn(f"{os.path.basename(url)}: {key} cannot be decoded ({error}); its label is -1")
            return StreamSample(torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8), -1, key)
        return StreamSample(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), int(label), key)
