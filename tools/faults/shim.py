"""Builds and drives interpose.c. A plan file says which call on which files fails and how; calls are counted in it.

The library must be preloaded (LD_PRELOAD) when the process starts. A forked child calls `attach(plan)`, and is under the
plan from then on.
"""

from __future__ import annotations

import ctypes
import errno
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("interpose.c")
# as `enum call` and `enum mode` of interpose.c
CALLS = (
    *("open", "read", "pread", "write", "pwrite", "fsync", "rename", "link", "unlink", "rmdir", "mkdir"),
    *("stat", "statvfs", "opendir", "readdir", "close", "ftruncate", "mmap", "utime", "flock", "sendfile", "readlink"),
)
_COUNT, _ONCE, _FOR_GOOD, _FULL, _SHORT, _TORN, _KILL_BEFORE, _KILL_AFTER, _DELAY = range(9)
PATH, TRACED = 256, 8192


@dataclass(frozen=True)
class Mode:
    """A way of failing. `number` is that of interpose.c; `only` lists the calls it applies to, empty = all."""

    name: str
    number: int
    error: int = 0
    only: frozenset[str] = frozenset()

    @property
    def is_kill(self) -> bool:
        return self.number in (_TORN, _KILL_BEFORE, _KILL_AFTER)

    def applies(self, call: str) -> bool:
        return not self.only or call in self.only


_ALLOCATES = frozenset({"open", "write", "pwrite", "fsync", "rename", "link", "mkdir", "ftruncate", "sendfile"})
_MOVES = frozenset({"read", "pread", "write", "pwrite", "sendfile"})
_WRITES = frozenset({"write", "pwrite", "sendfile"})
# calls that Linux and NFS may interrupt; not a stat or a rename
_SLOW = frozenset(
    {"open", "read", "pread", "write", "pwrite", "fsync", "close", "ftruncate", "flock", "sendfile", "statvfs"}
)
MODES = (
    Mode("EIO once", _ONCE, errno.EIO),
    Mode("EIO for good", _FOR_GOOD, errno.EIO),
    Mode("ENOSPC", _FULL, errno.ENOSPC, _ALLOCATES),
    Mode("ESTALE once", _ONCE, errno.ESTALE),
    Mode("EACCES once", _ONCE, errno.EACCES),
    Mode("EINTR", _ONCE, errno.EINTR, _SLOW),
    Mode("short", _SHORT, 0, _MOVES),
    Mode("torn", _TORN, 0, _WRITES),
    Mode("kill before", _KILL_BEFORE),
    Mode("kill after", _KILL_AFTER),
    Mode("delay", _DELAY),
)


class _Row(ctypes.Structure):
    _fields_ = (("call", ctypes.c_int32), ("path", ctypes.c_char * PATH))


class _Plan(ctypes.Structure):
    _fields_ = (
        ("prefix", ctypes.c_char * PATH * 2),
        ("call", ctypes.c_int32),
        ("mode", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("milliseconds", ctypes.c_int32),
        ("nth", ctypes.c_int64),
        ("counts", ctypes.c_int64 * len(CALLS)),
        ("fired", ctypes.c_int64),
        ("traced", ctypes.c_int64),
        ("trace", _Row * TRACED),
    )


class Plan:
    """A plan file. Without a `mode`, calls on files in `folders` are counted and recorded. With one, the `nth` `call` fails."""

    def __init__(
        self,
        path: Path,
        folders: list[Path],
        mode: Mode | None = None,
        call: str = "open",
        nth: int = 1,
        *,
        delay: float = 0.3,
    ) -> None:
        self.path = path
        values = _Plan()
        for place, folder in zip(values.prefix, folders, strict=False):
            place.value = str(folder).encode()
        values.call, values.nth, values.milliseconds = CALLS.index(call), nth, int(1000 * delay)
        if mode is not None:
            values.mode, values.error = mode.number, mode.error
        path.write_bytes(bytes(values))

    def read(self) -> _Plan:
        return _Plan.from_buffer_copy(self.path.read_bytes())

    def calls(self) -> list[tuple[str, str]]:
        """(call, path) of every recorded call, in order."""
        values = self.read()
        if values.traced > TRACED:
            raise RuntimeError(f"{values.traced} calls were made, {TRACED} can be recorded")
        return [(CALLS[row.call], row.path.decode(errors="replace")) for row in values.trace[: values.traced]]

    def fired(self) -> int:
        """How many calls failed because of the plan."""
        return int(self.read().fired)


def build(folder: Path) -> Path:
    """Compiles the library into `folder`. Returns its path."""
    library = folder / "interpose.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", str(library), str(SOURCE), "-ldl"], check=True)
    return library


def attach(plan: Path) -> None:
    """Puts this process under a plan. The library must be preloaded."""
    if ctypes.CDLL(None).interpose_attach(str(plan).encode()):
        raise RuntimeError(f"cannot attach to {plan}")
