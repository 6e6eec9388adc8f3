"""The signals that ask a run to stop, heard from the first moment: one that comes while torch is still being imported must not kill the rank.

Standard library only, so that `main.py` can listen before it imports anything that takes time. A handler only sets a flag; `training.stopping` reads it.
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
    """From now on, until as many calls of `restore`, the signals are noted; main thread only."""
    global _listeners
    if _listeners == 0:
        for number in SIGNALS:
            _previous[number] = signal.signal(number, _note)
    _listeners += 1


def received() -> int | None:
    """The first such signal since `listen`: a launcher that is interrupted sends SIGTERM after it."""
    return _received


def restore() -> None:
    """The last of those who listened gives the signals back to whoever had them, and forgets what was noted."""
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
