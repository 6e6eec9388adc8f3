"""`import lvtrain`: what it exports, at no cost until it is used, with types that editors and mypy see."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lvtrain

ROOT = Path(__file__).resolve().parent.parent


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, lvtrain; print(sorted(set(sys.modules) & {'torch', 'numpy', 'pydantic', 'onnx', 'PIL'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_is_there_documented_and_listed() -> None:
    assert set(lvtrain.__all__) <= set(dir(lvtrain))
    for name in lvtrain.__all__:
        value = getattr(lvtrain, name)
        assert value.__name__ == name and value.__doc__ and value.__module__.startswith("lvtrain.")
    with pytest.raises(AttributeError):
        lvtrain.load_modle  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    """What is imported under TYPE_CHECKING is what `__all__` says and what the interpreter finds, from the same rooms."""
    tree = ast.parse(Path(lvtrain.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen.keys() == set(lvtrain.__all__)
    for name, module in seen.items():
        assert getattr(lvtrain, name) is getattr(importlib.import_module(module), name)


def test_a_margins_help_shows_its_parameters() -> None:
    for margin in (lvtrain.CosFace, lvtrain.ArcFace, lvtrain.Combined, lvtrain.AdaFace):
        parameters = margin.section.model_fields.keys() - {"name", "warmup"}
        shown = margin.__doc__.partition("Args:")[2].splitlines()[1:]
        assert {line.strip().split(":")[0] for line in shown} == parameters and "m" in " ".join(parameters)
        assert all(f"by default {getattr(margin().settings, name)}." in margin.__doc__ for name in parameters)
