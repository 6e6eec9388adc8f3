"""Runs one part in a process of its own, which may crash, hang or fill the GPU without harm to the others.

The process is forked: this one has not imported torch, so the child begins as a new Python would.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import traceback
from pathlib import Path
from typing import Any

from tools.proof.part import Ended, Part


def run(part: Part, options: dict[str, Any], folder: Path, seconds: float) -> Ended:
    """Calls the part's function for at most `seconds`. Its output goes to `folder/NAME.log`."""
    answer, log = folder / f"{part.name}.answer", folder / f"{part.name}.log"
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(part, options, answer, log)
    status = _wait(child, started + seconds)
    with contextlib.suppress(ProcessLookupError):  # whatever the part started and left behind
        os.killpg(child, signal.SIGKILL)
    took = round(time.monotonic() - started, 1)
    if status is None:
        return Ended(part, "failed", took, f"still running after {took:.0f} s; see {log}")
    if not answer.exists():
        code = os.waitstatus_to_exitcode(status)
        return Ended(part, "failed", took, f"the process ended with {code}; see {log}")
    found = json.loads(answer.read_text())
    if "error" in found:
        return Ended(part, "failed", took, f"{found['error']}; see {log}")
    return Ended(part, "ran", took, result=found["result"])


def _wait(child: int, until: float) -> int | None:
    """The exit status, or None if the child had to be killed."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if time.monotonic() > until:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.05)


def _child(part: Part, options: dict[str, Any], answer: Path, log: Path) -> None:
    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    try:
        from tools.proof import work

        found = {"result": getattr(work, part.function)(folder=answer.parent, **options)}
    except BaseException as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        found = {"error": f"{type(error).__name__}: {lines[0]}"[:300]}
    try:
        answer.write_text(json.dumps(found, default=str))
    finally:
        os._exit(0)
