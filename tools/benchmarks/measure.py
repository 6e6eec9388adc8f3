"""What every benchmark measures with: clocks, the machine's matmul and copy rates, where the time went."""

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

    GPU: CUDA events, so nothing is waited for between marks. CPU: process time divided by the number of threads,
    which what else the machine does hardly blurs (it is too short where threads stand idle: measure with one thread).
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """`name` is what ends here."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.process_time() / torch.get_num_threads()))

    def seconds(self) -> dict[str, float]:
        """By name, summed; the first mark only starts the clock."""
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
    """Median seconds of a call, after one to warm up."""
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
    """Matmul flop/s of one large square matmul in the benchmark's precision and copy bytes/s, measured here and now."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    side, size = (8192, 1 << 30) if device.type == "cuda" else (1536, 1 << 26)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    matmul = 2 * side**3 / timed(lambda: a @ b, device, 7)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * size / timed(lambda: target.copy_(source), device)
    return {"matmul_tflops": round(matmul / 1e12, 3), "copy_gb_per_second": round(copy / 1e9, 1)}


def peak_memory(device: torch.device) -> float:
    """GB: of the allocator since its last reset on a GPU, resident memory of the process since its start on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)


def profile(step: Callable[[], Any], device: torch.device, rows: int = 12) -> dict[str, Any]:
    """One step under torch's profiler: the operators (kernels on a GPU) that took most, and the time the device stood
    idle.
    """
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    step()
    with profile(activities=activities) as profiler:
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        wall = time.perf_counter() - started
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, attribute))
    busy = sum(getattr(event, attribute) for event in events) / 1e6
    found: dict[str, Any] = {
        "top": [
            {"name": event.key[:80], "ms": round(getattr(event, attribute) / 1e3, 3), "calls": event.count}
            for event in events[:rows]
        ]
    }
    if device.type == "cuda":
        found["device_idle_share"] = round(max(0.0, 1 - busy / wall), 4)
    return found
