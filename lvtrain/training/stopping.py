"""Stopping on request: a signal or the end of the allotted time sets a flag, and all ranks stop after the same step.

A signal handler only sets a flag: saving inside a handler hangs in collectives or tears files. The flag travels by a
tiny all-reduce on the host (gloo, never the GPU's stream), started at the end of one step and read at the end of the
next, so agreeing costs no synchronisation; the price is that a request is honoured one step later.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lvtrain import signals
from lvtrain.distributed.world import World

_GO_ON, _OUT_OF_TIME, _SIGNALLED = 0, 1, 2


class Deadline:
    """Is there still time for another step and a checkpoint? Judged by the slowest recent step and the slowest save.

    Times in seconds. Two steps are reserved, because agreement takes one more step, and two saves, because one may just
    have begun in the background; a save not yet seen is taken to be a tenth of the allotted time, a minute at most.
    """

    def __init__(self, allotted: float, started: float) -> None:
        self.allotted, self.started = allotted, started
        self.steps: deque[float] = deque(maxlen=200)
        self.save: float | None = None

    def reserve(self) -> float:
        save = min(60.0, 0.1 * self.allotted) if self.save is None else self.save
        return 2 * max(self.steps, default=0.0) + 2 * save + min(30.0, 0.05 * self.allotted)

    def is_near(self, now: float) -> bool:
        return now - self.started + self.reserve() >= self.allotted


class Stopping:
    """`with Stopping(world, max_time_seconds) as stopping:`, then `stopping.should_stop(step)` after every step on every rank.

    max_time_seconds counts from `started` (a `time.monotonic` reading; construction when absent).
    """

    def __init__(
        self,
        world: World,
        max_time_seconds: float | None = None,
        *,
        started: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        vote_timeout_seconds: float = 1800.0,
    ) -> None:
        self.world, self.clock = world, clock
        started = clock() if started is None else started
        self.deadline = Deadline(max_time_seconds, started) if max_time_seconds is not None else None
        self.reason: str | None = None  # why all ranks stop, once they do
        self._group: Any = None
        self._vote: tuple[torch.Tensor, Any] | None = None
        self._vote_timeout = timedelta(seconds=vote_timeout_seconds)
        self._last_boundary: float | None = None
        self._listening = False

    def install(self) -> Stopping:
        """Listens for the signals (main thread only) and opens the ranks' own group for votes; a collective."""
        signals.listen()
        self._listening = True
        if self.world.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=self._vote_timeout)
        return self

    def uninstall(self) -> None:
        """Gives the signals back. A vote under way is left alone: after an error another rank may never answer it."""
        self._vote = None
        if self._listening:
            signals.restore()
        self._listening = False

    def __enter__(self) -> Stopping:
        return self.install()

    def __exit__(self, *exception: object) -> None:
        self.uninstall()

    @property
    def requested_locally(self) -> bool:
        """This rank alone wants to stop: it was signalled, or its time is nearly over."""
        return self._wish() != _GO_ON

    def _wish(self) -> int:
        if signals.received() is not None:
            return _SIGNALLED
        return _OUT_OF_TIME if self.deadline is not None and self.deadline.is_near(self.clock()) else _GO_ON

    def saved(self, seconds: float) -> None:
        """How long a checkpoint took, from the request to the commit, for the time to reserve."""
        if self.deadline is not None:
            self.deadline.save = max(seconds, self.deadline.save or 0.0)

    def should_stop(self, step: int) -> bool:
        """True on all ranks after the same step, at most one later than any rank's wish; a collective, once a step."""
        now = self.clock()
        if self.deadline is not None and self._last_boundary is not None:
            self.deadline.steps.append(now - self._last_boundary)
        self._last_boundary = now
        verdict = self._agree(self._wish())
        if verdict != _GO_ON and self.reason is None:
            number = signals.received()
            name = signal.Signals(number).name if number is not None else "a signal to another rank"
            self.reason = f"{name if verdict == _SIGNALLED else 'end of the allotted time'}, seen after step {step}"
        return verdict != _GO_ON

    def _agree(self, wish: int) -> int:
        if self._group is None:
            return wish
        verdict = _GO_ON
        if self._vote is not None:
            ballot, work = self._vote
            work.wait()
            verdict = int(ballot.item())
        ballot = torch.tensor([wish], dtype=torch.int32)
        self._vote = (ballot, dist.all_reduce(ballot, op=dist.ReduceOp.MAX, group=self._group, async_op=True))
        return verdict
