"""The trainer's room: no long signatures, and a loop and a step that each fit on a screen."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOM = Path(__file__).resolve().parent.parent / "lvtrain" / "training"


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda]]:
    for path in sorted(ROOM.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                yield f"{path.name}: {getattr(node, 'name', 'lambda')}", node


def arguments(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> list[str]:
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [argument.arg for argument in every if argument.arg not in ("self", "cls")]


def test_no_function_takes_more_than_six_arguments() -> None:
    assert {name: len(arguments(node)) for name, node in functions() if len(arguments(node)) > 6} == {}


def test_the_loop_and_a_step_fit_on_a_screen() -> None:
    lines = {name: node.end_lineno - node.lineno + 1 for name, node in functions() if node.end_lineno}
    for name in ("train_phases", "train_phase", "step", "train_micro_batch"):
        assert lines[f"trainer.py: {name}"] <= 50
