"""Runs one part in a process of its own, which may crash, hang or fill the GPU without harm to the others.

A part may do the same for what it does several times (`apart`): torch, NCCL and DeepSpeed then begin anew.

The process is forked: this one has not imported torch, so the child begins as a new Python would.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

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
        why = f"still running after {took:.0f} s"
    elif not answer.exists():
        why = f"the process ended with {os.waitstatus_to_exitcode(status)}"
    else:
        found = json.loads(answer.read_text())
        if "result" in found:
            return Ended(part, "ran", took, result=found["result"])
        why = found["error"]
    said = log.read_text(errors="replace") if log.exists() else ""
    return Ended(part, "failed", took, why, log=said[-4000:])


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


def _child(part: Part, options: dict[str, Any], answer: Path, log: Path) -> NoReturn:
    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)

    def function(**options: Any) -> Any:
        return getattr(importlib.import_module("tools.proof.work"), part.function)(**options)

    _answer(function, {"folder": answer.parent, **options}, answer)


def apart(function: Callable[..., Any], scratch: Path, /, **options: Any) -> Any:
    """What `function(**options)` returns, as JSON, called in a process of its own that ends with the part.

    Raises:
        RuntimeError: it failed.
    """
    answer = scratch / f"{uuid.uuid4().hex}.answer"
    child = os.fork()
    if child == 0:
        _answer(function, options, answer)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found = json.loads(answer.read_text()) if answer.exists() else {"error": f"the process ended with {code}"}
    if "error" in found:
        raise RuntimeError(found["error"])
    return found["result"]


def _answer(function: Callable[..., Any], options: dict[str, Any], answer: Path) -> NoReturn:
    """Calls the function, writes what it returns or why it failed, and ends this process."""
    try:
        found = {"result": function(**options)}
    except BaseException as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        found = {"error": f"{type(error).__name__}: {lines[0]}"[:300]}
    try:
        answer.write_text(json.dumps(found, default=str))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
