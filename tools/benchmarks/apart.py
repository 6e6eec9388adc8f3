"""Calls in processes of their own, steps that take turns, and the memory that one step needs."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lvtrain.errors import UserError

Step = Callable[[], Any]
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 33),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


def keeps_freed_memory() -> bool:
    """Whether malloc keeps freed memory in this process, as it does in those of `in_children`."""
    return all(os.environ.get(name) == value for name, value in _MALLOC.items())


def in_children(
    module: str,
    arguments: dict[str, Any],
    *,
    function: str = "run",
    threads: int = 1,
    ranks: int = 1,
    malloc: bool = True,
    limit_s: float = 3600,
) -> dict[str, Any]:
    """Calls `tools.benchmarks.MODULE.FUNCTION(**arguments)` in a new process, or one for each gloo rank. Returns rank 0's result.

    Raises:
        UserError: it fails (for example because memory ran out), or takes longer than `limit_s`.
    """
    code = f"import json, sys; from tools.benchmarks.{module} import {function} as f; print('RESULT ' + json.dumps(f(**json.loads(sys.argv[1]))))"
    environment = {key: value for key, value in os.environ.items() if key not in _MALLOC} | (_MALLOC if malloc else {})
    with tempfile.TemporaryDirectory() as folder:
        environment |= {"OMP_NUM_THREADS": str(threads), "WORLD_SIZE": str(ranks), "BENCHMARK_STORE": f"{folder}/store"}
        started = [
            subprocess.Popen(
                [sys.executable, "-c", code, json.dumps(arguments)],
                env=environment | {"RANK": str(rank)},
                cwd=Path(__file__).resolve().parents[2],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        try:
            ended = [process.communicate(timeout=limit_s) for process in started]
        except subprocess.TimeoutExpired as error:
            raise UserError(f"the benchmark's process was still running after {limit_s:.0f} s") from error
        finally:
            for process in started:
                process.kill()
    lines = [line for line in ended[0][0].splitlines() if line.startswith("RESULT ")]
    if not lines:
        message = (ended[0][1].strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the benchmark's process ended with {started[0].returncode}: {message}")
    found: dict[str, Any] = json.loads(lines[-1][len("RESULT ") :])
    return found


def interleaved(
    steps: dict[str, Step], repeats: int, device: torch.device, *, warm_up: bool = True
) -> dict[str, float]:
    """Median milliseconds of each step. The steps take turns."""
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + warm_up):
        for name, step in steps.items():
            if device.type == "cuda":
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                step()
                end.record()
                torch.cuda.synchronize()
                milliseconds = float(begin.elapsed_time(end))
            else:
                started = time.process_time()
                step()
                milliseconds = 1e3 * (time.process_time() - started)
            if turn or not warm_up:
                spent[name].append(milliseconds)
    return {name: statistics.median(values) for name, values in spent.items()}


def extra_memory(step: Step, device: torch.device) -> float:
    """Peak MB of one step, beyond what was held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    # a first call, because libraries keep thread pools and kernels: only the step is to be measured
    torch.mm(torch.randn(512, 512), torch.randn(512, 512))
    resident = forget_peak()
    step()
    return round(max(0.0, resident_mb("VmHWM") - resident), 1)


def forget_peak() -> float:
    """Resets the peak of `resident_mb("VmHWM")`, and returns the resident MB now.

    getrusage's peak cannot be reset, and is inherited from the parent.
    """
    Path("/proc/self/clear_refs").write_text("5")
    return resident_mb("VmRSS")


def resident_mb(name: str) -> float:
    """This process's resident MB: `VmRSS` now, `VmHWM` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))
