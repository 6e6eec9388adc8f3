"""Recipe keys that were renamed or removed: for error messages, and for run folders of earlier versions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

# old dotted key -> new dotted key, or a function of the old value that returns the new keys with their values. `*` is an element of a list.
OLD_KEYS: dict[str, str | Callable[[Any], dict[str, Any]]] = {
    "phases.*.virtual_batches": "phases.*.micro_batches",
    "init_from.head": "init_from.classifier",
    "logging.tensorboard": lambda on: {"logging.trackers": ["tensorboard"] if on else []},
    "backbone.checkpoint_every": lambda every: {"backbone.overrides.checkpoint_every": every} if every != 1 else {},
    "classifier.precision": "classifier.numerics.precision",
    "classifier.kernel": lambda kernel: {"classifier.numerics.kernel": "auto" if kernel == "torch" else kernel},
    "classifier.gather": "classifier.numerics.gather",
    "classifier.keep_mb": "classifier.numerics.keep_mb",
}
ANY = object()
# removed dotted key -> (the value that means the same as its absence, or ANY; why it was removed)
REMOVED_KEYS: dict[str, tuple[Any, str]] = {
    "data.read_ahead": (ANY, "three micro-batches are read ahead"),
    "data.prefetch": (ANY, "three micro-batches are decoded ahead"),
    "safety.max_nonfinite": (ANY, "three steps in a row that are not finite stop a run"),
    "schedule.power": (1.0, "schedule.shape=quadratic is power 2"),
    "classifier.optimizer.momentum": (0.9, "the class centres have the backbone's momentum, optimizer.momentum"),
    "optimizer.gradient_communication": (
        "float32",
        'for bfloat16 write "communication_data_type": "bf16" in the DeepSpeed JSON',
    ),
    "checkpoint.background": (ANY, "checkpoints are always written in the background"),
    "evaluation.batch": (ANY, "verification embeds 128 images at a time"),
    "classifier.chunk": (None, "the number of classes in a chunk is chosen from the shapes"),
    "classifier.optimizer.kernel": (ANY, "classifier.numerics.kernel decides for the optimizer of the centres, too"),
    "classifier.optimizer.in_backward": (False, "it went with neither sampling nor several micro-batches"),
}
# dotted key -> the value that meant nothing, in run folders of versions where every margin and phase had every key
RESTING_KEYS: dict[str, Any] = {
    "classifier.margin.m": None,
    "classifier.margin.m1": 1.0,
    "classifier.margin.m2": 0.0,
    "classifier.margin.m3": 0.0,
    "classifier.margin.straight_through": False,
    "phases.*.expectation": "off",
}


def answer(place: tuple[Any, ...]) -> str | None:
    """The answer to the old key at `place`; None if it never was a key."""
    for old, new in OLD_KEYS.items():
        if _fits(old, place):
            name = new if isinstance(new, str) else ", ".join(new(None))
            return f"it is called {_filled(name, old, place)} now"
    for old, (_, why) in REMOVED_KEYS.items():
        if _fits(old, place):
            return f"it was removed: {why}"
    return None


def translate(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe of an earlier version, with today's keys.

    A removed key stays if its value had a meaning, so that a comparison lists it.
    """
    values = copy.deepcopy(values)
    for old, new in OLD_KEYS.items():
        for place in list(_places(values, old.split("."))):
            value = _parent(values, place).pop(place[-1])
            moved = {new: value} if isinstance(new, str) else new(value)
            for name, today in moved.items():
                target = [_number(part) for part in _filled(name, old, place).split(".")]
                _parent(values, target, make=True).setdefault(target[-1], today)
    resting = {key: (neutral, "") for key, neutral in RESTING_KEYS.items()}
    for old, (neutral, _) in (REMOVED_KEYS | resting).items():
        for place in list(_places(values, old.split("."))):
            if neutral is ANY or _parent(values, place)[place[-1]] in (neutral, None):
                del _parent(values, place)[place[-1]]
    return values


def _fits(pattern: str, place: tuple[Any, ...]) -> bool:
    parts = pattern.split(".")
    return len(parts) == len(place) and all(part in ("*", str(key)) for part, key in zip(parts, place))


def _filled(name: str, pattern: str, place: Any) -> str:
    """`name` with its stars replaced by the list elements of `place`."""
    stars = iter([str(key) for part, key in zip(pattern.split("."), place) if part == "*"])
    return ".".join(next(stars) if part == "*" else part for part in name.split("."))


def _places(node: Any, parts: list[str], before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    first, rest = parts[0], parts[1:]
    if first == "*":
        keys: list[Any] = list(range(len(node))) if isinstance(node, list) else []
    else:
        keys = [first] if isinstance(node, dict) and first in node else []
    for key in keys:
        if rest:
            yield from _places(node[key], rest, (*before, key))
        else:
            yield (*before, key)


def _parent(values: Any, place: Any, *, make: bool = False) -> Any:
    for key in place[:-1]:
        if make and isinstance(values, dict) and values.get(key) is None:
            values[key] = {}
        values = values[key]
    return values


def _number(part: str) -> int | str:
    return int(part) if part.isdigit() else part
