"""Requests to stop a run: signals, a closed terminal, a launcher that has ended.

`main.py` calls `listen` before it imports torch, so that a signal during the import does not kill the rank. So this file
needs only the standard library. A handler only sets a flag, which `training.stopping` reads after every step.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)  # not SIGUSR1: NCCL may use it
_previous: dict[int, Any] = {}
_received: int | None = None
_listeners = 0
_launcher: list[int] = []  # the processes that started this rank, the nearest first


def listen() -> None:
    """Notes the signals from now on, until `restore` has been called as often as `listen`. Main thread only."""
    global _listeners
    if _listeners == 0:
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # under nohup a run continues without its terminal
            _previous[number] = signal.signal(number, _note)
        _launcher[:] = _launcher_processes()
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
        _previous.clear()
        _received = None


def launcher_is_gone() -> bool:
    """Whether `deepspeed` or `torchrun`, which started this rank, has ended without a signal to it.

    It then cannot report how the run ends, and nobody starts the other ranks again.
    """
    return bool(_launcher) and _launcher_processes(len(_launcher)) != _launcher


def drop_console() -> None:
    """Discards all further output, because its terminal or pipe is closed.

    Without this, the next line would end the rank before it has saved.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _launcher_processes(depth: int | None = None) -> list[int]:
    """The parent, where it is a launcher; and its parent, where that is the outer one of DeepSpeed's two launchers."""
    parent = os.getppid()
    if depth is None:
        inner = "deepspeed.launcher.launch" in _command(parent)
        depth = 2 if inner else 1 if "TORCHELASTIC_RUN_ID" in os.environ else 0
    return [parent, _parent_of(parent)][:depth]


def _command(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _parent_of(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    _received = _received or number
    if number == signal.SIGHUP and (os.isatty(1) or os.isatty(2)):
        drop_console()
    if number == signal.SIGINT:
        signal.signal(number, signal.default_int_handler)
        if os.environ.get("RANK", "0") == "0":
            try:
                os.write(2, b"\nlvtrain: stopping after this step, with a checkpoint; Ctrl-C again to stop at once\n")
            except OSError:  # what was behind it has been interrupted, too
                drop_console()
