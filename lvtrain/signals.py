"""The signals that ask a run to stop.

`main.py` calls `listen` before it imports torch, so that a signal during the import does not kill the rank. So this file
needs only the standard library. A handler only sets a flag, which `training.stopping` reads after every step.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)  # not SIGUSR1: NCCL may use it
_previous: dict[int, Any] = {}
_received: int | None = None
_listeners = 0


def listen() -> None:
    """Notes the signals from now on, until `restore` has been called as often as `listen`. Main thread only."""
    global _listeners
    if _listeners == 0:
        for number in SIGNALS:
            _previous[number] = signal.signal(number, _note)
    _listeners += 1


def received() -> int | None:
    """The first signal since `listen`, None if there was none.

    Later ones are ignored: an interrupted launcher sends SIGTERM after the first.
    """
    return _received


def restore() -> None:
    """Ends one `listen`. The last one reinstalls the former handlers and clears the recorded signal."""
    global _received, _listeners
    _listeners -= 1
    if _listeners == 0:
        for number, handler in _previous.items():
            signal.signal(number, handler)
        _received = None


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    _received = _received or number
    if number == signal.SIGINT:
        signal.signal(number, signal.default_int_handler)
        if os.environ.get("RANK", "0") == "0":
            os.write(2, b"\nlvtrain: stopping after this step, with a checkpoint; Ctrl-C again to stop at once\n")
