"""Runs a function on several gloo ranks of this machine, one process each."""

from __future__ import annotations

import gc
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tools.trial import PRELOADED


def _enter(
    rank: int, world_size: int, store: str, function: Callable[..., Any], args: tuple[Any, ...], results: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        results.put((rank, function(rank, world_size, *args), None))
    except Exception:
        results.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 300.0) -> list[Any]:
    """Calls `function(rank, world_size, *args)` on every rank and returns the values in rank order (tensors are fine).

    `function` must be importable (module level). An exception on any rank is raised here with its traceback.
    """
    # forked from a process that has imported the heavy libraries once and done nothing else; there is one for all of pytest's process
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # a plain queue would pass tensors by shared memory of processes that may be gone: pass bytes
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_pickled_enter, args=(rank, world_size, f"{folder}/store", function, args, results))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        values: dict[int, Any] = {}
        try:
            for _ in processes:
                rank, value, error = _receive(results, processes, timeout)
                if error:
                    raise RuntimeError(f"rank {rank} of {world_size} failed:\n{error}")
                values[rank] = value
        finally:
            for process in processes:
                process.join(0 if len(values) < world_size else 30)
                if process.is_alive():
                    process.kill()
    return [values[rank] for rank in range(world_size)]


class _Bytes:
    def __init__(self, queue: Any) -> None:
        self.queue = queue

    def put(self, item: Any) -> None:
        import io

        buffer = io.BytesIO()
        torch.save(item, buffer)
        self.queue.put(buffer.getvalue())


def _pickled_enter(
    rank: int, world_size: int, store: str, function: Callable[..., Any], args: tuple[Any, ...], results: Any
) -> None:
    gc.freeze()  # what was imported before the fork need not be looked through again
    _enter(rank, world_size, store, function, args, _Bytes(results))


def _receive(results: Any, processes: list[Any], timeout: float) -> Any:
    import io
    import time

    end = time.monotonic() + timeout
    while results.empty():
        if time.monotonic() > end:
            raise TimeoutError(f"no rank answered within {timeout} s")
        if all(not process.is_alive() for process in processes) and results.empty():
            raise RuntimeError(
                f"ranks ended without an answer, exit codes {[process.exitcode for process in processes]}"
            )
        time.sleep(0.01)
    return torch.load(io.BytesIO(results.get()), weights_only=False)
