"""Counts how often the host waits for the device, and why."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "is_nonzero",
    "equal",
    "bincount",
}


class _Operators(TorchDispatchMode):
    """Counts operators whose values or sizes the host must know before it can continue, so it would wait for a GPU."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).split(".")[1]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in _WAITING or by_mask:
            self.found[f"{name} by mask" if by_mask else name] += 1
        return function(*args, **(kwargs or {}))


class _Numbers(TorchFunctionMode):
    """Counts host numbers that are made a tensor on a given device: with a GPU, the host waits for that copy."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name == "new_tensor" or (name in ("tensor", "as_tensor") and (kwargs or {}).get("device") is not None):
            self.found[f"{name} from numbers"] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def host_waits(device: torch.device) -> Iterator[Counter[str]]:
    """Counts the waits inside a `with`, by cause, in this thread.

    - Everywhere: DeepSpeed's synchronisations of the whole device, by place in the code.
    - On a GPU: torch's warnings, by place. They do not cover waiting for an event.
    - On a CPU: operators that would wait on a GPU, and numbers that are copied to the device. A tensor's copy is not
      noticed. An operator on host tensors is counted, although it would not wait.
    """
    # imported here: without `engine` before it, DeepSpeed looks for a GPU and prints that there is none
    from deepspeed.accelerator import get_accelerator

    found: Counter[str] = Counter()
    accelerator = get_accelerator()
    synchronize = accelerator.synchronize

    def counted(*arguments: Any) -> None:
        caller = sys._getframe(1)
        found[f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno} synchronize"] += 1
        synchronize(*arguments)

    with mock.patch.object(accelerator, "synchronize", counted):
        if device.type == "cpu":
            with _Numbers(found), _Operators(found):
                yield found
            return
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
        found.update(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
