"""Heartbeats: how a hung rank is found, reported and ended.

The training thread calls `beat`, which only sets an attribute. A watchdog thread in every rank does the rest:

* every few seconds it writes `heartbeat/rank_NUMBER.json`: what the rank is doing, and since when;
* after half the timeout without a beat it writes all stacks to `logs/stacks_rank_NUMBER.log`;
* at the timeout it writes them again and ends the process. The launcher then ends the other ranks, which wait for this
  one in a collective.

A rank whose job was replaced while it was frozen leaves the files to the job that took over (`Fence`).

The log of the rank that is furthest behind has the reason. A C call that never releases Python's interpreter lock stops
the watchdog too; the timer of `faulthandler`, which needs no lock, then ends the process a little later.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvtrain.files.patience import patiently
from lvtrain.files.reading import parse_json

if TYPE_CHECKING:  # this file needs only the standard library: `slurm_status.py` reads heartbeats outside the container
    from lvtrain.checkpoint.lease import Fence

EXIT_HUNG = 70


@dataclass(frozen=True)
class Beat:
    """What a rank is `doing` in `step`, and `since` when; its file was `written` then. Times are seconds since 1970."""

    rank: int
    host: str
    pid: int
    step: int
    doing: str
    since: float
    written: float


class Heartbeat:
    """The heartbeat of one rank, from `with heartbeat:` on; `heartbeat.beat(step, "data")` at each part of a step."""

    def __init__(
        self,
        run_folder: Path,
        rank: int,
        timeout_seconds: float = 1800.0,
        *,
        interval_seconds: float = 5.0,
        fence: Fence | None = None,
    ) -> None:
        self.rank, self.timeout, self._fence = rank, timeout_seconds, fence
        self.interval = min(interval_seconds, timeout_seconds / 8)
        self.folder = Path(run_folder) / "heartbeat"
        self.log = Path(run_folder) / "logs" / f"stacks_rank_{rank:05d}.log"
        self._last = (0, "start", time.monotonic(), time.time())
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lvtrain-watchdog", daemon=True)
        self._warned = False
        self._stacks: Any = None

    def beat(self, step: int, doing: str = "step") -> None:
        """This rank now begins `doing` in `step`. Writes no file."""
        self._last = (step, doing, time.monotonic(), time.time())
        self._warned = False

    def __enter__(self) -> Heartbeat:
        patiently(self.folder.mkdir, parents=True, exist_ok=True)
        patiently(self.log.parent.mkdir, parents=True, exist_ok=True)
        self._stacks = patiently(self.log.open, "a")
        self.beat(0, "start")
        self._arm()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):  # a file that stays there does no harm
            self._stacks.close()
            if not self._may_write():
                return
            if self.log.stat().st_size == 0:
                self.log.unlink()
            (self.folder / _file_name(self.rank)).unlink(missing_ok=True)

    def _watch(self) -> None:
        while True:
            self._write()
            self._arm()
            silent = time.monotonic() - self._last[2]
            if silent > self.timeout:
                self._report(silent)
                slow = behind(self.folder)
                sys.stderr.write(
                    f"lvtrain: rank {self.rank} ends: no progress for {silent:.0f} s; {slow}; stacks: {self.log}\n"
                )
                sys.stderr.flush()
                os._exit(EXIT_HUNG)
            if silent > self.timeout / 2 and not self._warned:
                self._warned = True
                self._report(silent)
            if self._end.wait(self.interval):
                return

    def _arm(self) -> None:
        """Restarts `faulthandler`'s timer. If it is not restarted in time, it writes all stacks and ends the process."""
        faulthandler.dump_traceback_later(self.timeout + 4 * self.interval, exit=True, file=self._stacks)

    def _report(self, silent: float) -> None:
        step, doing = self._last[:2]
        where = f"{silent:.0f} s in {doing!r} of step {step}"
        self._stacks.write(f"\n{time.strftime('%F %T')} rank {self.rank}: {where}; {behind(self.folder)}\n")
        self._stacks.flush()
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)

    def _may_write(self) -> bool:
        return self._fence is None or self._fence.is_open()

    def _write(self) -> None:
        if not self._may_write():
            return
        step, doing, _, since = self._last
        beat = Beat(self.rank, socket.gethostname(), os.getpid(), step, doing, since, time.time())
        target = self.folder / _file_name(self.rank)
        try:
            beside = target.with_suffix(".new")
            beside.write_text(json.dumps(asdict(beat)))
            beside.replace(target)
        except OSError:  # a full disk must not end a healthy rank
            pass


def _file_name(rank: int) -> str:
    return f"rank_{rank:05d}.json"


def read_all(folder: Path) -> list[Beat]:
    """The heartbeats of all ranks that can be read."""
    beats = []
    for path in sorted(Path(folder).glob("rank_*.json")):
        try:
            beats.append(Beat(**parse_json(path.read_text())))
        except (OSError, ValueError, TypeError):
            continue
    return beats


def behind(folder: Path, *, now: float | None = None, stale_seconds: float = 30.0) -> str:
    """Names the rank that all wait for: one whose watchdog is silent (frozen or gone), else the one furthest behind."""
    now = time.time() if now is None else now
    beats = read_all(folder)
    if not beats:
        return "no heartbeats found"
    frozen = [beat for beat in beats if now - beat.written > stale_seconds]
    slowest = min(frozen or beats, key=lambda beat: (beat.step, beat.since))
    state = f"for {now - slowest.since:.0f} s"
    if frozen:
        state = f"its watchdog silent for {now - slowest.written:.0f} s, {_process_state(slowest)}"
    who = f"rank {slowest.rank} on {slowest.host} (pid {slowest.pid})"
    return f"furthest behind is {who}: {slowest.doing!r} of step {slowest.step}, {state}"


def _process_state(beat: Beat) -> str:
    if beat.host != socket.gethostname():
        return "on another host"
    try:
        lines = Path(f"/proc/{beat.pid}/status").read_text().splitlines()
        return "process " + next(line for line in lines if line.startswith("State"))
    except (OSError, StopIteration):
        return "the process is gone"
