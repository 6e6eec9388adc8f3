"""Reads a configuration file of arcface_torch without running it.

The file is Python, but only assignments `config.KEY = VALUE` are read, from its syntax tree. A value is a literal, a tuple
or list of values, a key or name that was assigned before, or arithmetic on numbers. Everything else is listed with its line.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lvtrain.errors import UserError

LARGEST_FILE = 1 << 17  # bytes; theirs have about 1,000
_LARGEST_NUMBER = 1e18
_MOST_TEXT = 80
_OBJECTS = ("config", "cfg")

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class NotTaken(ValueError):
    """Why a statement or value was not read, as the end of "not taken: ..."."""


@dataclass
class ArcfaceConfig:
    """What the file assigns.

    Attributes:
        values: by key, the last assignment.
        lines: line of that assignment, by key.
        not_taken: (line, source text, reason) of everything that was not read.
    """

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    not_taken: list[tuple[int, str, str]] = field(default_factory=list)


def read_config(path: Path) -> ArcfaceConfig:
    """The assignments of a configuration file.

    Raises:
        UserError: the file is missing, too large, not text or not Python, or assigns nothing.
    """
    text = _text(path)
    try:
        tree = ast.parse(text)
        reader = _Reader(text)
        for statement in tree.body:
            reader.read(statement)
    except SyntaxError as error:
        raise UserError(
            f"{path}: line {error.lineno or 1} is not Python ({error.msg}); give one of configs/*.py"
        ) from None
    except (ValueError, RecursionError, MemoryError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError | MemoryError) else str(error)
        raise UserError(f"{path} is not a configuration: {reason}; give one of configs/*.py") from None
    if not reader.config.values:
        raise UserError(
            f"{path} assigns no key of `config`; give a file of arcface_torch's configs/, such as configs/ms1mv3_r50.py"
        )
    return reader.config


def _text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path} is not a file; give a file of arcface_torch's configs/, such as configs/ms1mv3_r50.py")
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise UserError(
            f"{path} has {size:,} bytes, and a configuration at most {LARGEST_FILE:,}; give one of configs/*.py"
        )
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; give one of configs/*.py") from None


class _Reader:
    def __init__(self, text: str) -> None:
        self.config = ArcfaceConfig()
        self._text = text.splitlines()
        self._names: dict[str, Any] = {}

    def read(self, statement: ast.stmt) -> None:
        """One statement at the top of the file."""
        match statement:
            case ast.Expr(value=ast.Constant()) | ast.Import() | ast.ImportFrom() | ast.Pass():
                return
            case ast.Assign(targets=[target], value=value) | ast.AnnAssign(target=target, value=ast.expr() as value):
                self._try(statement, lambda: self._assign(target, value))
            case ast.AugAssign(target=target, op=op, value=value):
                self._try(
                    statement, lambda: self._set(target, self._binary(op, self._value(target), self._value(value)))
                )
            case ast.If() | ast.For() | ast.While() | ast.With() | ast.Try() | ast.FunctionDef() | ast.ClassDef():
                self._skip(statement, "only plain assignments are read, and nothing is run")
            case _:
                self._skip(statement, "nothing is run")

    def _try(self, statement: ast.stmt, step: Callable[[], None]) -> None:
        try:
            step()
        except NotTaken as reason:
            self._skip(statement, str(reason))

    def _skip(self, statement: ast.stmt, reason: str) -> None:
        line = " ".join(self._text[statement.lineno - 1].split()) if statement.lineno <= len(self._text) else ""
        shown = "".join(letter if letter.isprintable() else "?" for letter in line)
        shown = shown if len(shown) <= _MOST_TEXT else shown[: _MOST_TEXT - 3] + "..."
        self.config.not_taken.append((statement.lineno, shown, reason))

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name) and target.id in _OBJECTS:
            self._begin(value)
        else:
            self._set(target, self._value(value))

    def _begin(self, value: ast.expr) -> None:
        """`config = edict()`, also with the keys in the call."""
        pairs: list[tuple[object, ast.expr]]
        match value:
            case ast.Call(args=[], keywords=keywords):
                pairs = [(keyword.arg, keyword.value) for keyword in keywords]
            case ast.Dict(keys=keys, values=values) | ast.Call(args=[ast.Dict(keys=keys, values=values)], keywords=[]):
                pairs = [(key.value if isinstance(key, ast.Constant) else None, one) for key, one in zip(keys, values)]
            case _:
                raise NotTaken("a configuration begins with config = edict()")
        for key, one in pairs:
            if not isinstance(key, str):
                raise NotTaken("a key is not a plain name")
            self._keep(key, self._value(one), one.lineno)

    def _set(self, target: ast.expr, value: Any) -> None:
        if (key := _key(target)) is not None:
            self._keep(key, value, target.lineno)
        elif isinstance(target, ast.Name):
            self._names[target.id] = value
        else:
            raise NotTaken("it assigns to something else than config.KEY")

    def _keep(self, key: str, value: Any, line: int) -> None:
        self.config.values[key], self.config.lines[key] = value, line

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None):
                return _bounded(node.value)
            case ast.Tuple(elts=elements) | ast.List(elts=elements):
                return [self._value(element) for element in elements]
            case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
                number = _number(self._value(operand))
                return -number if isinstance(node.op, ast.USub) else number
            case ast.BinOp(left=left, op=op, right=right):
                return self._binary(op, self._value(left), self._value(right))
            case ast.Name(id=name):
                if name not in self._names:
                    raise NotTaken(f"the name {name} is not assigned in this file")
                return self._names[name]
            case ast.Attribute() | ast.Subscript() if (key := _key(node)) is not None:
                if key not in self.config.values:
                    raise NotTaken(f"config.{key} is not assigned before")
                return self.config.values[key]
            case ast.Call():
                raise NotTaken("its value is a call, and nothing is run")
            case _:
                raise NotTaken("its value is neither a literal nor arithmetic")

    def _binary(self, op: ast.operator, left: Any, right: Any) -> Any:
        if type(op) is ast.Pow:
            return _power(_number(left), _number(right))
        if type(op) not in _BINARY:
            raise NotTaken("its value is neither a literal nor arithmetic")
        try:
            return _bounded(_BINARY[type(op)](_number(left), _number(right)))
        except (ZeroDivisionError, OverflowError) as error:
            raise NotTaken(f"its value cannot be computed ({error})") from None


def _key(node: ast.expr) -> str | None:
    """KEY of `config.KEY` or `config["KEY"]`."""
    match node:
        case ast.Attribute(value=ast.Name(id=name), attr=key) if name in _OBJECTS:
            return key
        case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=str() as key)) if name in _OBJECTS:
            return key
    return None


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NotTaken(f"arithmetic on {type(value).__name__} is not read")
    return value


def _power(base: int | float, exponent: int | float) -> Any:
    if abs(exponent) > 64 or abs(base) > 1e6:
        raise NotTaken("its value is too large")
    try:
        return _bounded(base**exponent)
    except (ZeroDivisionError, OverflowError) as error:
        raise NotTaken(f"its value cannot be computed ({error})") from None


def _bounded(value: Any) -> Any:
    if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
        raise NotTaken("its value is not a finite number")
    if isinstance(value, int | float) and abs(value) > _LARGEST_NUMBER:
        raise NotTaken("its value is too large")
    return value
