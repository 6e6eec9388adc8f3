"""Who waits for the device in a training step: the host's waits of a trace, by our innermost function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tests.fakecuda.device import Call


def waits_of_ours(trace: Iterable[Call]) -> Counter[str]:
    """How often each function of lvtrain held the host in `training`'s step: `room/file.py:function`.

    A wait inside of DeepSpeed is DeepSpeed's, one while inductor loads a kernel is inductor's. One in backward, on
    autograd's own thread, is ours (`backward`): the operator that waits was our choice. The loader's threads may wait.
    """
    found: Counter[str] = Counter()
    for call in trace:
        if (call.kind == "sync" or call.text.endswith("pageable")) and (place := _place(call)):
            found[place] += 1
    return found


def _place(call: Call) -> str | None:
    if not call.stack:
        return "backward"
    in_step = any("/lvtrain/training/" in file and function == "step" for file, function in call.stack)
    on_autograds_thread = not any(function in ("<module>", "_bootstrap") for _, function in call.stack)
    if not (in_step or on_autograds_thread):
        return None
    for file, function in call.stack:
        if "/deepspeed/" in file or "/torch/_inductor/" in file:
            return None
        if "/lvtrain/" in file:
            return f"{file.rpartition('/lvtrain/')[2]}:{function}"
    return "backward"
