"""Stopping on request: after a signal, or before the time is over, all ranks stop after the same step.

A signal handler only sets a flag, because saving inside a handler would hang in collectives or cut files. The ranks
agree by a small all-reduce on the host (gloo). It is started at the end of a step and read at the end of the next one,
so no rank waits for it. In return, a request takes effect one step later.
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
    """Whether there is time for another step and a checkpoint, judged by the slowest recent step and the slowest save.

    Two steps are reserved, because the ranks agree one step later, and two saves, because one may have just begun in the
    background. Before the first save its length is taken to be a tenth of the allotted time, at most a minute.

    Args:
        allotted: seconds, from `started` (a reading of `time.monotonic`).
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
    """`with stopping:`, then `stopping.should_stop(step)` after every step on every rank.

    Args:
        max_time_seconds: from `started`, a reading of `time.monotonic` (None: from construction).

    Attributes:
        reason: why all ranks stop, once they do.
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
        self.reason: str | None = None
        self._group: Any = None
        self._vote: tuple[torch.Tensor, Any] | None = None
        self._vote_timeout = timedelta(seconds=vote_timeout_seconds)
        self._last_boundary: float | None = None

    def __enter__(self) -> Stopping:
        """Listens for the signals (main thread only) and opens a process group for the votes. A collective."""
        signals.listen()
        if self.world.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=self._vote_timeout)
        return self

    def __exit__(self, *exception: object) -> None:
        """Stops listening. It does not wait for an unfinished vote: after an error another rank may never answer."""
        self._vote = None
        signals.restore()

    def _wish(self) -> int:
        if signals.received() is not None or signals.launcher_is_gone():
            return _SIGNALLED
        return _OUT_OF_TIME if self.deadline is not None and self.deadline.is_near(self.clock()) else _GO_ON

    def saved(self, seconds: float) -> None:
        """Notes the seconds that a checkpoint took, from the request to the commit."""
        if self.deadline is not None:
            self.deadline.save = max(seconds, self.deadline.save or 0.0)

    def should_stop(self, step: int) -> bool:
        """True on all ranks after the same step, at most one step after any rank was asked. A collective."""
        now = self.clock()
        if self.deadline is not None and self._last_boundary is not None:
            self.deadline.steps.append(now - self._last_boundary)
        self._last_boundary = now
        verdict = self._agree(self._wish())
        if verdict != _GO_ON and self.reason is None:
            number = signals.received()
            name = signal.Signals(number).name if number is not None else "a signal to another rank"
            name = "the launcher is gone" if number is None and signals.launcher_is_gone() else name
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
