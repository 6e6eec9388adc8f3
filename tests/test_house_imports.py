"""The house: a room imports only from floors below its own, and no files or rooms import each other in a circle."""

from __future__ import annotations

import ast
import graphlib
from collections import Counter, defaultdict
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "lvtrain"
FLOORS = [
    {"errors", "randomness", "signals", "faults", "files", "recipe", "distributed"},
    {"backbones", "checkpoint", "data"},
    {"engine", "classifier", "weights"},
    {"methods", "planning", "evaluation", "health"},
    {"training", "datasets"},
    {"export", "report", "launch"},
    {"main", "__main__", "__init__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports() -> dict[str, set[str]]:
    known = modules()
    arrows: dict[str, set[str]] = defaultdict(set)
    for module, path in known.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                below = (f"{node.module}.{alias.name}" for alias in node.names)
                targets = [name if name in known else node.module for name in below]
            elif isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                continue
            arrows[module].update(target for target in targets if target in known and target != module)
    return arrows


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in modules()} <= FLOOR.keys()


def test_no_import_goes_up_a_floor() -> None:
    up = [
        f"{module} -> {target}"
        for module, targets in imports().items()
        for target in targets
        if target != "lvtrain" and FLOOR[room(target)] > FLOOR[room(module)]
    ]
    assert up == []


@pytest.mark.parametrize("level", ["files", "rooms"])
def test_no_circle(level: str) -> None:
    arrows: dict[str, set[str]] = defaultdict(set)
    for module, targets in imports().items():
        for target in targets:
            source, end = (module, target) if level == "files" else (room(module), room(target))
            if source != end and end not in ("lvtrain", "__init__"):
                arrows[source].add(end)
    list(graphlib.TopologicalSorter(arrows).static_order())  # raises CycleError with the circle


def test_folders_are_rooms_and_not_bags_of_prefixes() -> None:
    assert len(list(PACKAGE.glob("*.py"))) - 1 <= 6  # besides __init__
    files = Counter(path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
    assert {folder: count for folder, count in files.items() if count > 16} == {}
