"""Runs functions in processes whose torch sees a fake H200, and reads what they asked of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
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

        `copy_limit`: copies and memsets of more bytes are only counted.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "value.json").unlink(missing_ok=True)
        call = {
            "function": function,
            "arguments": arguments,
            "folder": str(folder),
            "environment": environment or {},
            "copy_limit": copy_limit,
        }
        assert self._process.stdin
        print(json.dumps(call), file=self._process.stdin, flush=True)
        code = int(self._answer())
        value = folder / "value.json"
        return Ended(code, json.loads(value.read_text()) if value.exists() else None, folder)

    def _answer(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(180)  # a busy machine
        self._errors.close()
