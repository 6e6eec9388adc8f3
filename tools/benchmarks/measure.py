"""What all benchmarks share: clocks, the machine's matmul and copy rates, peak memory, a profile."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

import torch


def pick_device(name: str = "auto") -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} thread(s)"


class Clock:
    """Marks points of a step and gives the seconds between them.

    On a GPU it uses CUDA events, so nothing waits between marks. On a CPU it uses process time divided by the number of
    threads, which other load on the machine hardly changes. (With idle threads that is too short: measure with one.)
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """Marks the end of the part `name`."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.process_time() / torch.get_num_threads()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each part, summed over its marks. The first mark only starts the clock."""
        if self.cuda:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (_, before), (name, after) in zip(self.marks, self.marks[1:]):
            elapsed = before.elapsed_time(after) / 1e3 if self.cuda else after - before
            found[name] = found.get(name, 0.0) + elapsed
        return found


def median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def timed(function: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """Median seconds of a call, after one call to warm up."""
    function()
    found = []
    for _ in range(repeats):
        clock = Clock(device)
        clock.mark("start")
        function()
        clock.mark("it")
        found.append(clock.seconds()["it"])
    return median(found)


def machine_rates(device: torch.device, precision: str) -> dict[str, float]:
    """This machine's rates, measured now: flop/s of a large matmul in this precision, and copied bytes/s."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    side, size = (8192, 1 << 30) if device.type == "cuda" else (768, 1 << 26)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    # as layers do, by the transposed: on some CPUs the plain product is ten times slower in bfloat16
    matmul = 2 * side**3 / timed(lambda: torch.nn.functional.linear(a, b), device, 7)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * size / timed(lambda: target.copy_(source), device)
    return {"matmul_tflops": float(f"{matmul / 1e12:.4g}"), "copy_gb_per_second": round(copy / 1e9, 1)}


def peak_memory(step: Callable[[None], Any], device: torch.device) -> float:
    """Peak memory of a step in GB, after two calls to warm up.

    On a GPU it is the allocator's peak in a third call. On a CPU it is the process's peak resident memory since its
    start, so call this before anything else is built.
    """
    step(None), step(None)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step(None)
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)


def profile(step: Callable[[], Any], device: torch.device, rows: int = 12) -> dict[str, Any]:
    """One step under torch's profiler: the operators (kernels on a GPU) that took most time.

    On a GPU also the share of the time without any kernel, and the milliseconds of communication kernels, hidden or not.
    """
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    step()
    with profile(activities=activities) as profiler:
        started = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        wall = time.perf_counter() - started
    # an operator's row repeats the time of its kernels: only the kernels' rows are counted
    events = [
        (event.key, (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3, event.count)
        for event in profiler.key_averages()
        if not cuda or (event.device_type.name == "CUDA" and not event.is_user_annotation)
    ]
    events.sort(key=lambda event: -event[1])
    found: dict[str, Any] = {
        "top": [{"name": name[:80], "ms": round(ms, 3), "calls": calls} for name, ms, calls in events[:rows]]
    }
    if cuda:
        communication = [ms for name, ms, _ in events if "nccl" in name.lower()]
        busy = sum(ms for _, ms, _ in events) - sum(communication)  # they run at the same time as the others
        found["communication_ms"] = round(sum(communication), 3)
        found["device_idle_share"] = round(max(0.0, 1 - busy / 1e3 / wall), 4)
    return found
