"""Runs functions in processes whose torch sees a fake H200, and reads what they asked of it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fakecuda.build import build

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass
class Call:
    """One line of a trace. `stack`: where the host waits, Python's as (file, function), the innermost frame first."""

    kind: str
    thread: int
    stream: str
    text: str
    stack: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Ended:
    """A call that is over: its exit status, what it returned, and where its output and its trace are."""

    code: int
    value: Any
    folder: Path

    @property
    def output(self) -> str:
        return (self.folder / "log.txt").read_text(errors="replace")

    def trace(self) -> list[Call]:
        return list(read_trace(self.folder / "trace.txt"))


def read_trace(path: Path) -> Iterator[Call]:
    call: Call | None = None
    for line in path.read_text(errors="replace").splitlines():
        if line.count("\t") >= 3:
            if call:
                yield call
            kind, thread, stream, text = line.split("\t", 3)
            call = Call(kind, int(thread), stream, text)
        elif call and line.startswith("  File "):
            file, _, function = line.removeprefix('  File "').partition('", line ')
            call.stack.append((file, function.partition(" in ")[2]))
    if call:
        yield call


class FakeDevice:
    """Built in `folder`, for as long as the object is open.

    Raises:
        Unsupported: it cannot be built here.
    """

    def __init__(self, folder: Path) -> None:
        libraries = build(folder)
        environment = {
            name: value for name, value in os.environ.items() if name not in ("DS_ACCELERATOR", "TRITON_INTERPRET")
        }
        environment |= {
            "LD_PRELOAD": ":".join(map(str, libraries)),
            "TRITON_LIBCUDA_PATH": str(folder),  # where Triton's own launchers find what they are linked with
            "TRITON_CACHE_DIR": str(folder / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-m", "tests.fakecuda.serve"]
        self._errors = (folder / "serve.txt").open("w")
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._log = folder / "serve.txt"
        self._numbers = itertools.count()
        if self._answer() != "ready":
            raise RuntimeError(f"the fake device did not start: {self._log.read_text()[-3000:]}")

    def call(
        self,
        function: str,
        *arguments: Any,
        folder: Path,
        environment: dict[str, str] | None = None,
        copy_limit: int | None = None,
    ) -> Ended:
        """Calls `module:function` with JSON arguments in a new process; output and trace go to `folder`.

        An exception while it waits (a test's time limit, Ctrl-C) ends that process.

        `copy_limit`: copies and memsets of more bytes are only counted.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "value.json").unlink(missing_ok=True)
        number = next(self._numbers)
        call = {
            "number": number,
            "function": function,
            "arguments": arguments,
            "folder": str(folder),
            "environment": environment or {},
            "copy_limit": copy_limit,
        }
        assert self._process.stdin
        print(json.dumps(call), file=self._process.stdin, flush=True)
        process = 0
        try:
            process = self._answer_to(number)
            code = self._answer_to(number)
        except BaseException:
            if process:
                with suppress(ProcessLookupError):  # it has just ended
                    os.killpg(process, signal.SIGKILL)
            raise
        value = folder / "value.json"
        return Ended(code, json.loads(value.read_text()) if value.exists() else None, folder)

    def _answer_to(self, number: int) -> int:
        """The next answer to this call. Those to a call that was given up come first."""
        while True:
            call, _, answer = self._answer().partition(" ")
            if not answer:
                raise RuntimeError(f"the fake device has ended: {self._log.read_text()[-3000:]}")
            if int(call) == number:
                return int(answer)

    def _answer(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(180)  # a busy machine
        self._errors.close()
