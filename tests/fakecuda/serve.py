"""The process behind `device.FakeDevice`: it has imported everything, sees the fake GPU, and forks once for each call.

A call comes as a line of JSON on standard input. Two lines go back on standard output, each with the call's number: the
process that it runs in, and that process's exit status.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

STACK_SIGNAL = signal.SIGRTMIN + 5
PRELOADED = ["lvtrain.main", "lvtrain.training.trainer", "lvtrain.training.checks", "sklearn.metrics", "torch._dynamo"]


def main() -> None:
    library = ctypes.CDLL("libcuda.so.1")
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever is printed while importing is not an answer
    del os.environ["LD_PRELOAD"]  # compilers that are started from here need no GPU
    import torch

    # asking the runtime for its devices would make torch refuse CUDA in forked processes
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.device_count", return_value=1),
    ):
        for name in PRELOADED:
            importlib.import_module(name)
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    print("ready", file=answers)
    for line in sys.stdin:
        call = json.loads(line)
        number = call.pop("number")
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.setpgid(0, 0)
                code = _child(library, **call)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)  # what a fake device leaves behind at exit is not lvtrain's
        with suppress(OSError):  # whoever is first: the child may have done it, and may have ended
            os.setpgid(child, child)
        print(number, child, file=answers)
        print(number, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers)


def _child(
    library: Any, function: str, arguments: list[Any], folder: str, environment: dict[str, str], copy_limit: int | None
) -> int:
    """Calls `module:function`, files in `folder`; an integer it returns is the exit status."""
    handle = os.open(f"{folder}/log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    faulthandler.enable()  # the host touched the device's memory: say where
    trace = open(f"{folder}/trace.txt", "ab", buffering=0)  # noqa: SIM115 (faulthandler's until the end)
    faulthandler.register(STACK_SIGNAL, file=trace, all_threads=False)
    library.fakecuda_trace(trace.name.encode(), int(STACK_SIGNAL))
    if copy_limit is not None:
        library.fakecuda_copy_limit(ctypes.c_size_t(copy_limit))
    module, _, name = function.partition(":")
    try:
        value = getattr(importlib.import_module(module), name)(*arguments)
    except SystemExit as end:
        value = end.code or 0
    except BaseException:
        traceback.print_exc()
        return 71
    Path(folder, "value.json").write_text(json.dumps(value))
    return value if isinstance(value, int) else 0


if __name__ == "__main__":
    main()
