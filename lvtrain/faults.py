"""Faults on demand, for tests.

`LVTRAIN_FAULT="point:rank:step:action"` injects one; several are separated by `;`, and `*` means any rank or step.
Points are named where they stand in the code, such as `save.mid_file` or `loop.step`. Actions:

- `sigkill`, `sigstop`, `sigterm`, `sigusr2`: sends that signal to this process.
- `asked`: waits until this process has been asked to stop.
- `hold=FILE`: waits while that file exists, even if asked to stop.
- `raise`: raises a RuntimeError.
- `enospc`, `eio`, `erofs`: raises an OSError of that number.
- Any other word is returned to the caller, which acts on it (`nan` at `loop.outputs`).

Without the variable a point costs one dictionary look-up.
"""

from __future__ import annotations

import errno
import os
import signal
import time

from lvtrain import signals

VARIABLE = "LVTRAIN_FAULT"
_SIGNALS = {"sigkill": signal.SIGKILL, "sigstop": signal.SIGSTOP, "sigterm": signal.SIGTERM, "sigusr2": signal.SIGUSR2}
_ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO, "erofs": errno.EROFS}


def point(name: str, *, rank: int, step: int) -> str | None:
    """A place where a fault may be injected. Returns the action if the caller must carry it out, else None."""
    faults = os.environ.get(VARIABLE)
    if not faults:
        return None
    for fault in faults.split(";"):
        where, for_rank, for_step, action = fault.split(":")
        if where == name and for_rank in ("*", str(rank)) and for_step in ("*", str(step)):
            return _act(action, fault)
    return None


def _act(action: str, fault: str) -> str | None:
    if action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[action])
        return None
    if action in _ERRORS:
        raise OSError(_ERRORS[action], os.strerror(_ERRORS[action]))
    if action == "raise":
        raise RuntimeError(f"injected fault {fault}")
    if action.startswith("hold="):
        while os.path.exists(action.removeprefix("hold=")):
            time.sleep(0.05)
        return None
    if action == "asked":
        while signals.received() is None:
            time.sleep(0.05)
        return None
    return action
