"""An ordered map over processes. It holds only a few results at a time, and detects a killed worker."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from lvtrain.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    initializer: Callable[..., None] | None = None,
    initargs: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """Like `map(function, items)`, in `workers` processes. Results come in the items' order.

    One worker means this process. Processes are spawned, not forked: the caller may hold threads (a progress bar, torch),
    whose locks a fork would copy.

    Raises:
        UserError: a worker died without an exception, probably because memory ran out.
    """
    if workers == 1:
        if initializer:
            initializer(*initargs)
        yield from map(function, items)
        return
    remaining = iter(items)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(initializer, initargs)) as pool:
        waiting: deque[Future[Result]] = deque(
            pool.submit(_call, function, item) for item in islice(remaining, 3 * workers)
        )
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(_call, function, item) for item in islice(remaining, 1))
                yield result
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed (out of memory?); give fewer --workers and start again"
            ) from None
        finally:
            for future in waiting:
                future.cancel()


_refusal: Exception | None = None  # of this worker's initializer


def _start(initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    global _refusal
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        if initializer:
            initializer(*initargs)
    except Exception as error:  # raised here, it would break the pool without a reason that the user can read
        _refusal = error


def _call(function: Callable[[Item], Result], item: Item) -> Result:
    if _refusal is not None:
        raise _refusal
    return function(item)


def _end_with_parent() -> None:
    """Ends this worker when its parent is killed. Otherwise it would still write while the next pack runs."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
