"""One job at a time in a run folder: a lease with a heartbeat.

The holder touches `lease.json` every few seconds. While the holder lives, a second job refuses to start. When the holder
is dead, the second job takes over:

- at once, if the death can be seen: the process does not exist in this container of this host, or the holder was an
  earlier start of the same Slurm job;
- otherwise, when the heartbeat has stood still long enough.

Every rank has a `Fence`: before it writes into the run folder, it checks that the lease still has its job's token. So a job
that was frozen and replaced writes nothing. Ages are measured by the file system's clock only, so the nodes' clocks need not agree.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lvtrain.distributed import world as worlds
from lvtrain.distributed.world import World
from lvtrain.errors import UserError
from lvtrain.files.atomic import clear, write_json
from lvtrain.files.patience import FORBIDDEN, in_words, patiently
from lvtrain.files.reading import parse_json

NAME = "lease.json"
ELSEWHERE = "make room or get the permission, or choose another folder with runs=PATH"


class FolderInUse(UserError):
    """Another job works in the run folder."""


class Takeover(FolderInUse):
    """Another job has taken the run folder over."""


class Fence:
    """Says whether the job of `token` still holds the folder; for every rank, before it writes there."""

    def __init__(self, folder: Path, token: str) -> None:
        self.path, self.token = folder / NAME, token

    def check(self) -> None:
        """Checks that this job still holds the lease.

        Raises:
            Takeover: another job holds it, or no job does.
        """
        holder = _read(self.path)
        if holder is None or holder["token"] != self.token:
            who = "nobody" if holder is None else _describe(holder)
            raise Takeover(f"{self.path.parent} was taken over by {who}; this job stops without writing")

    def is_open(self) -> bool:
        """Whether this job may write. False, too, while the file system fails."""
        try:
            self.check()
        except (Takeover, OSError):
            return False
        return True


class Lease(Fence):
    """Held from construction to `release`.

    Raises:
        FolderInUse: another job works in the folder; its host, process and job are named.
    """

    def __init__(
        self,
        folder: Path,
        *,
        heartbeat: float = 5.0,
        stale_after: float = 30.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(folder, uuid.uuid4().hex)
        self._stop = threading.Event()
        self._acquire(stale_after, sleep)
        self._beat = threading.Thread(target=self._keep_alive, args=(heartbeat,), name="lease", daemon=True)
        self._beat.start()

    def release(self) -> None:
        self._stop.set()
        self._beat.join()
        with contextlib.suppress(OSError):  # a lease that stays behind is that of a dead process
            holder = _read(self.path)
            if holder is not None and holder["token"] == self.token:
                self.path.unlink(missing_ok=True)

    def _acquire(self, stale_after: float, sleep: Callable[[float], None]) -> None:
        waited = 0.0
        first = _stamp(self.path)
        while (holder := _read(self.path)) is not None and not _is_dead(holder):
            if _stamp(self.path) != first:
                raise FolderInUse(f"{self.path.parent} is in use by {_describe(holder)}; wait for it or stop it")
            if waited >= stale_after or _age(self.path) >= stale_after:
                break
            sleep(0.5)
            waited += 0.5
        mine = {
            "token": self.token,
            "host": socket.gethostname(),
            "processes": _process_table(),
            "pid": os.getpid(),
            "started": _process_start(os.getpid()),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "slurm_restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        }
        try:
            write_json(self.path, mine, writer=self.token)
        except OSError as error:
            raise in_words(error, self.path, ELSEWHERE, users=FORBIDDEN) from error
        self.check()

    def _keep_alive(self, heartbeat: float) -> None:
        while not self._stop.wait(heartbeat):
            try:
                holder = _read(self.path)
                if holder is None or holder["token"] != self.token:
                    return  # the next commit notices it and reports it
                os.utime(self.path)
            except OSError:
                continue  # the next save reports a full or absent file system


@contextmanager
def hold(folder: Path, world: World) -> Iterator[Fence]:
    """Holds the folder's lease during a `with`. Makes the folder if it is missing. A collective.

    Yields:
        The fence of this job. Rank 0's is the lease.

    Raises:
        FolderInUse: another job works in the folder. Nothing in it has changed.
        UserError: the folder cannot be made or written.
    """
    mine: Lease | None = None

    def take() -> str:
        nonlocal mine
        try:
            patiently(folder.mkdir, parents=True, exist_ok=True)
        except OSError as error:
            raise in_words(error, folder, ELSEWHERE, users=FORBIDDEN) from error
        mine = Lease(folder)
        with contextlib.suppress(OSError):
            clear(folder)
        return mine.token

    token = worlds.on_first(take)
    try:
        yield mine or Fence(folder, token)
    finally:
        if mine is not None:
            mine.release()


def _read(path: Path) -> dict[str, Any] | None:
    """The holder of the lease; None = nobody. If a crash left half a file, an unknown holder is returned.

    Raises:
        OSError: the file system kept failing. There may be a holder.
    """
    try:
        return parse_json(patiently(path.read_text))
    except FileNotFoundError:
        return None
    except ValueError:
        return {"token": "", "host": "?", "pid": -1, "started": None, "slurm_job": None, "slurm_restarts": 0}


def _stamp(path: Path) -> int | None:
    try:
        return patiently(path.stat).st_mtime_ns
    except FileNotFoundError:
        return None


def _age(path: Path) -> float:
    """Seconds since the last heartbeat, by the file system's own clock."""
    probe = path.with_name(f".clock_{uuid.uuid4().hex}")
    try:
        probe.touch()
        return (probe.stat().st_mtime_ns - (_stamp(path) or 0)) / 1e9
    except OSError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _is_dead(holder: dict[str, Any]) -> bool:
    job = os.environ.get("SLURM_JOB_ID")
    if (
        job is not None
        and holder["slurm_job"] == job
        and holder["slurm_restarts"] < int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    ):
        return True
    # containers may share a host name and not their processes; leases of earlier versions do not say
    is_here = holder["host"] == socket.gethostname() and holder.get("processes", _process_table()) == _process_table()
    return is_here and _process_start(holder["pid"]) != holder["started"]


def _process_table() -> str:
    """Which process numbers are meant: this boot of this machine, and the namespace of this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # a sandbox may hide them
        return ""


def _process_start(pid: int) -> str | None:
    """When a process of this host started, in clock ticks since boot; None if it does not run (nor does a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


def _describe(holder: dict[str, Any]) -> str:
    job = f", Slurm job {holder['slurm_job']}" if holder["slurm_job"] else ""
    return f"process {holder['pid']} on {holder['host']}{job}"
