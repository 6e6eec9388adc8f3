"""interpose.c, built and driven: a plan file says which call of which kind on which files fails, and counts what was called.

The library must be preloaded (LD_PRELOAD) where the process starts; a forked child then says `attach(plan)` and is under the plan from there on.
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
    """What a call is given. `number` is interpose.c's; `only`: the calls it makes sense for, empty for all."""

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
# what Linux and NFS may interrupt: a stat or a rename is not
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
    """A plan file at `path`: without a `mode` calls on files under `folders` are counted and noted, else the `nth` of `call` gets it."""

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
        """(call, path) of everything that was counted, in order."""
        values = self.read()
        if values.traced > TRACED:
            raise RuntimeError(f"{values.traced} calls were made, {TRACED} can be noted")
        return [(CALLS[row.call], row.path.decode(errors="replace")) for row in values.trace[: values.traced]]

    def fired(self) -> int:
        """How many calls were given the fault."""
        return int(self.read().fired)


def build(folder: Path) -> Path:
    """The library, compiled into `folder`."""
    library = folder / "interpose.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", str(library), str(SOURCE), "-ldl"], check=True)
    return library


def attach(plan: Path) -> None:
    """Puts this process, where the library is preloaded, under a plan."""
    if ctypes.CDLL(None).interpose_attach(str(plan).encode()):
        raise RuntimeError(f"cannot attach to {plan}")
