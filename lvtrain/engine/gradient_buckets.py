"""The gradients' sum over the ranks under ZeRO 1 and 2, begun while the backward pass still computes.

DeepSpeed sums all gradients at once when the backward pass has ended. Its own `overlap_comm` makes the backward pass wait
for the bucket before, and the host for the device (DeepSpeed issues 8364 and 8061). Here the gradients are copied into
buckets in the order in which the backward pass usually gives them, and a full bucket is summed by the communication
library, on a stream of its own. Nobody waits until the backward pass has ended; then the device does, not the host.

A bucket holds the same parameters at the same places in every step. So the bits of a sum do not depend on when it is
made. They do depend on the size of the buckets if there are more than two ranks: a ring begins its sum at a rank that
depends on a number's place in the buffer (lvtrain/engine/README.md has figures).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

ELEMENTS = 16 * 2**20  # of a bucket: 64 MB in float32


class GradientBuckets:
    """Takes the place of DeepSpeed's own buckets in its optimizer.

    Args:
        optimizer: DeepSpeed's, of stage 1 or 2 without offloading.
        parameters: the trained ones, in the order of the module.
        elements: at most so many of a bucket; a larger parameter has a bucket of its own.
        overlap: False: the sums begin when the backward pass has ended. They have the same bits.
    """

    def __init__(
        self, optimizer: Any, parameters: Iterable[torch.nn.Parameter], *, elements: int, overlap: bool
    ) -> None:
        self._optimizer, self._overlap = optimizer, overlap
        self._ranks = dist.get_world_size()
        self._buckets = list(self._cut(list(parameters)[::-1], elements)) if self._ranks > 1 else []
        self._bucket_of = {id(parameter): bucket for bucket in self._buckets for parameter in bucket.places}
        self._started = 0
        # what DeepSpeed calls at each gradient, for each gradient after the backward pass, and then once
        self._methods = {
            "process_gradients": self._take,
            "reduce_ready_partitions_and_remove_grads": lambda parameter, group: None,
            "reduce_ipg_grads": self._finish,
        }
        vars(optimizer).update(self._methods)

    def _cut(self, parameters: list[torch.nn.Parameter], elements: int) -> Iterator[_Bucket]:
        members: list[torch.nn.Parameter] = []
        for parameter in parameters:
            format = self._optimizer.get_param_comm_dtype(parameter)
            full = sum(member.numel() for member in members) + parameter.numel() > elements
            if members and (full or format != self._optimizer.get_param_comm_dtype(members[0])):
                yield _Bucket(members, self._optimizer.get_param_comm_dtype(members[0]))
                members = []
            members.append(parameter)
        yield _Bucket(members, self._optimizer.get_param_comm_dtype(members[0]))

    def _take(self, parameter: torch.nn.Parameter, group: int) -> None:
        """A gradient is complete for this micro-batch."""
        last = self._optimizer.is_gradient_accumulation_boundary()
        if not (self._optimizer.partition_gradients or last):
            return
        if self._ranks == 1:  # nothing to sum; the same rounding as on several ranks
            assert parameter.grad is not None
            parameter.grad = parameter.grad.to(self._optimizer.get_param_comm_dtype(parameter)).to(parameter.dtype)
            return
        self._bucket_of[id(parameter)].take(parameter, self._ranks)
        # in the same order on every rank: a bucket waits for the one before
        while self._overlap and self._started < len(self._buckets) and self._buckets[self._started].is_full:
            self._buckets[self._started].start()
            self._started += 1

    def _finish(self) -> None:
        """Leaves the sums in the gradients of the parameters that this rank updates."""
        for bucket in self._buckets[self._started :]:
            bucket.start()
        for bucket in self._buckets:
            bucket.finish(self._is_own)
        self._started = 0

    def release(self) -> None:
        """Gives DeepSpeed's optimizer its own methods back, so that nothing here keeps it alive."""
        for name in self._methods:
            vars(self._optimizer).pop(name, None)

    def _is_own(self, parameter: torch.nn.Parameter) -> bool:
        optimizer = self._optimizer
        return bool(optimizer.is_param_in_current_partition[optimizer.get_param_id(parameter)])


class _Bucket:
    """Some parameters' gradients in one buffer, for as long as they are on the way.

    Attributes:
        places: where each parameter's gradient begins.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], format: torch.dtype) -> None:
        self.places: dict[torch.nn.Parameter, int] = {}
        self._size, self._format = 0, format
        for parameter in parameters:
            self.places[parameter] = self._size
            self._size += parameter.numel()
        self._clear()

    def _clear(self) -> None:
        self._buffer: torch.Tensor | None = None
        self._taken: set[torch.nn.Parameter] = set()
        self._streams: set[torch.cuda.Stream] = set()
        self._work: Any = None

    @property
    def is_full(self) -> bool:
        return len(self._taken) == len(self.places)

    def _place(self, buffer: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
        return buffer.narrow(0, self.places[parameter], parameter.numel())

    def take(self, parameter: torch.nn.Parameter, ranks: int) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if self._work is not None or parameter in self._taken:
            raise RuntimeError("a gradient came twice in one backward pass; it has been summed over the ranks already")
        if self._buffer is None:
            self._buffer = torch.empty(self._size, dtype=self._format, device=gradient.device)
        torch.div(gradient.reshape(-1), ranks, out=self._place(self._buffer, parameter))
        parameter.grad = None
        self._taken.add(parameter)
        if gradient.is_cuda:
            self._streams.add(torch.cuda.current_stream(gradient.device))

    def start(self) -> None:
        """The sum begins, behind what has been given to the device so far. A bucket without gradients has none."""
        if self._buffer is None:
            return
        for parameter in self.places:
            if parameter not in self._taken:  # it had no part in the loss
                self._place(self._buffer, parameter).zero_()
        if self._buffer.is_cuda:
            current = torch.cuda.current_stream(self._buffer.device)
            for stream in self._streams - {current}:  # a compiled backward pass may have several
                current.wait_stream(stream)
        self._work = dist.all_reduce(self._buffer, async_op=True)

    def finish(self, is_own: Any) -> None:
        if self._buffer is None:
            return
        self._work.wait()
        for parameter in self._taken:
            if is_own(parameter):
                whole = self._place(self._buffer, parameter)
                parameter.grad = whole.to(parameter.dtype, copy=True).view_as(parameter)
        self._clear()
