"""Batches for one rank, without end: order -> index -> bytes -> decoded and augmented views on the device.

Position p of the endless stream is `samples_seen`. A step at s0 trains positions [s0, s0 + G); micro-batch v holds
[s0 + v*m, s0 + (v+1)*m); rank r of R runs v in [r*V/R, (r+1)*V/R). Everything a batch holds is a function of its positions and the seed, so
reading ahead, restarting and changing R cannot change it.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lvtrain.data.augment import View, draw
from lvtrain.data.augment import augmentation as augmentation_views
from lvtrain.data.decoding.choose import make_backend
from lvtrain.data.decoding.job import Backend, DecodedViews, DecodeSpec, Job
from lvtrain.data.order import SampleOrder
from lvtrain.data.shards import ReadError, ShardDataset
from lvtrain.distributed.world import to_device
from lvtrain.errors import UserError

_ASKED_AT_ONCE = 8


@dataclass
class Batch:
    """One micro-batch on the device.

    Attributes:
        views: by name, float32 [m, 3, size, size], RGB, (x - 127.5) / 127.5.
        labels: int64 [m]; -1 is a sample that could not be decoded (its views are zero) and is ignored by the losses.
        sample_ids: int64 [m], on the host.
        bad_rows: rows that could not be decoded.
    """

    views: dict[str, torch.Tensor]
    labels: torch.Tensor
    sample_ids: torch.Tensor
    bad_rows: tuple[int, ...] = ()

    @property
    def images(self) -> torch.Tensor:
        return self.views["image"]


@dataclass(frozen=True)
class BadSample:
    """An image that could not be decoded, where it lies (shard and key), and why."""

    sample_id: int
    shard: str
    key: str
    reason: str


class Loader:
    """Iterates `Batch`es of this rank's micro-batches without end. Its counts cover only what it has yielded.

    Args:
        dataset: opened in this process.
        seed: of the order and the augmentation.
        block: samples that the order keeps together.
        micro_batch: images m of a micro-batch.
        micro_batches: V per step over all ranks; the global batch is m * V.
        rank: of this process.
        size: number of ranks, which must divide V.
        start: samples_seen at the first batch.
        augmentation: a set's name (`lvtrain.data.augment.SETS`).
        image_size: pixels of the views that do not fix their own.
        device: where the views are delivered.
        backend: `dali`, `torch`, or `auto` (DALI where it can be imported).
        threads: that decode.
        prefetch: micro-batches decoded ahead.
        read_ahead: micro-batches read at the same time, ahead of those being decoded. It hides the latency of a distant file system.
        warn: called with a line when data is late or a read failed.

    Raises:
        UserError: R does not divide V (the allowed R are listed), unknown set or backend.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        *,
        seed: int,
        micro_batch: int,
        micro_batches: int,
        block: int = 4096,
        rank: int = 0,
        size: int = 1,
        start: int = 0,
        augmentation: str | tuple[View, ...] = "flip",
        image_size: int = 112,
        device: str | torch.device = "cpu",
        backend: str = "auto",
        threads: int = 2,
        prefetch: int = 3,
        read_ahead: int = 3,
        warn: Callable[[str], None] | None = None,
        stall_seconds: float = 60.0,
    ) -> None:
        if micro_batches % size:
            allowed = [ranks for ranks in range(1, micro_batches + 1) if micro_batches % ranks == 0]
            raise UserError(f"{size} ranks do not divide micro_batches={micro_batches}; use one of {allowed} ranks")
        self.dataset, self.seed, self.start = dataset, seed, start
        self.order = SampleOrder(len(dataset), seed, block)
        self.micro_batch, self.micro_batches, self.rank, self.size = micro_batch, micro_batches, rank, size
        self.views = augmentation_views(augmentation) if isinstance(augmentation, str) else augmentation
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            # each thread has its own current device
            self.device = torch.device("cuda", torch.cuda.current_device())
        if warn is not None:
            dataset.warn = warn
        self.warn, self.stall_seconds = dataset.warn, stall_seconds
        self.on_read: Callable[[np.ndarray, np.ndarray, list[bytes]], None] | None = None
        self.bad_samples: list[BadSample] = []
        self.bad_count = 0
        self.seen_count = 0
        self.wait_seconds = 0.0
        self._read_ahead = max(1, read_ahead)
        self._known_bad: set[int] = set()
        self._backend = backend
        self._spec = DecodeSpec(
            self.views,
            image_size=image_size,
            stored_size=dataset.manifest.image_size,
            micro_batch=micro_batch,
            device=self.device,
            threads=threads,
            depth=max(1, prefetch),
        )
        self._queue: queue.Queue[_Ready | BaseException] = queue.Queue(maxsize=self._spec.depth)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------------------------------------ what comes when

    def positions(self, number: int) -> np.ndarray:
        """Stream positions int64 [m] of this rank's `number`-th micro-batch after `start`."""
        per_step = self.micro_batches // self.size
        step, within = divmod(number, per_step)
        first = self.start + (step * self.micro_batches + self.rank * per_step + within) * self.micro_batch
        return np.arange(first, first + self.micro_batch, dtype=np.int64)

    def global_labels(self, samples_seen: int, global_batch: int) -> np.ndarray:
        """Labels int64 [global_batch] of all ranks' samples of the step at `samples_seen`, from the index, without communication.

        Bad samples keep their label here: only the rank that decodes them finds out.
        """
        return self.dataset.labels(self.order.at(range(samples_seen, samples_seen + global_batch)))

    # ---------------------------------------------------------------------------------------------------- iteration

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._stop.is_set():
            raise StopIteration
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
            self._thread.start()
        started = time.monotonic()
        while True:
            try:
                ready = self._queue.get(timeout=self.stall_seconds)
                break
            except queue.Empty:
                self.warn(
                    f"rank {self.rank} has waited {time.monotonic() - started:.0f} s for data; is the file system stalling?"
                )
        self.wait_seconds += time.monotonic() - started
        if isinstance(ready, BaseException):
            self._stop.set()
            raise ready
        self.seen_count += self.micro_batch
        self.bad_count += len(ready.bad)
        for sample in ready.bad:
            if sample.sample_id not in self._known_bad:
                self._known_bad.add(sample.sample_id)
                self.bad_samples.append(sample)
        return ready.on(self.device)

    def close(self) -> None:
        """Stops the threads; the loader yields no more."""
        self._stop.set()
        while self._thread is not None and self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *details: Any) -> None:
        self.close()

    # --------------------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        if self.device.type == "cuda":
            # a separate stream: decoding ahead must not wait behind the training step's kernels
            with torch.cuda.stream(torch.cuda.Stream(self.device)):
                self._produce()
        else:
            self._produce()

    def _produce(self) -> None:
        backend: Backend | None = None
        readers = ThreadPoolExecutor(self._read_ahead, "reader")
        reading: deque[Future[Job]] = deque()
        try:
            backend = make_backend(self._backend, self._spec)
            stream = self._stream()
            submitted = collected = 0
            while not self._stop.is_set():
                while submitted - collected < self._spec.depth:
                    while len(reading) <= self._read_ahead:  # the one that is due, and those ahead of it
                        reading.append(readers.submit(self._job, *next(stream)))
                    backend.submit(reading.popleft().result())
                    submitted += 1
                decoded = backend.collect()
                collected += 1
                self._put(self._finish(decoded))
        except BaseException as error:  # the consumer raises it
            self._put(error)
        finally:
            readers.shutdown(wait=False, cancel_futures=True)
            if backend is not None:
                backend.close()

    def _put(self, item: _Ready | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _stream(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Positions and sample ids int64 [m] of one micro-batch after the other. The order is computed for several at once, which is cheaper."""
        for first in itertools.count(0, _ASKED_AT_ONCE):
            positions = np.stack([self.positions(number) for number in range(first, first + _ASKED_AT_ONCE)])
            yield from zip(positions, self.order.at(positions.ravel()).reshape(positions.shape))

    def _job(self, positions: np.ndarray, ids: np.ndarray) -> Job:
        """A micro-batch as read from the shards, before decoding."""
        epochs = self.order.epochs(positions)
        job = Job(
            ids=ids,
            labels=self.dataset.labels(ids),
            encoded=[],
            draws={view.name: draw(view, self.seed, epochs, ids) for view in self.views},
        )
        for row, data in enumerate(self.dataset.read_batch(self.dataset.records(ids))):
            if isinstance(data, ReadError):
                job.bad[row] = str(data)
                data = b""
            job.encoded.append(data)
        if self.on_read is not None:
            self.on_read(job.ids, job.labels, job.encoded)
        return job

    def _finish(self, decoded: DecodedViews) -> _Ready:
        job = decoded.job
        labels = torch.from_numpy(job.labels.copy())
        rows = sorted(job.bad)
        if rows:
            labels[rows] = -1
            for images in decoded.views.values():
                images[rows] = 0.0
        event = None
        if self.device.type == "cuda":
            labels = to_device(labels, self.device)
            event = torch.cuda.Event()
            event.record()
        bad = [BadSample(int(job.ids[row]), *self.dataset.describe(int(job.ids[row])), job.bad[row]) for row in rows]
        return _Ready(Batch(decoded.views, labels, torch.from_numpy(job.ids), tuple(rows)), bad, event)


@dataclass
class _Ready:
    batch: Batch
    bad: list[BadSample]
    event: torch.cuda.Event | None

    def on(self, device: torch.device) -> Batch:
        if self.event is not None:
            # the batch was made on the loader's stream
            stream = torch.cuda.current_stream(device)
            stream.wait_event(self.event)
            for tensor in (*self.batch.views.values(), self.batch.labels):
                tensor.record_stream(stream)
        return self.batch
