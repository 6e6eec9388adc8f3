"""Runs a benchmark and prints JSON. The same commands run on a CPU and on a GPU.

\b
python tools/benchmark.py backbone --name vit_l --batch 384
python tools/benchmark.py step --name vit_s --batch 384 --classes 360232
python tools/benchmark.py allpairs --images 200000
python tools/benchmark.py all

A subject is a module of `tools/benchmarks`. The arguments of its function
`run(...) -> dict` are the options. `SMALL` makes `all` take seconds.
"""  # noqa: D301 (click's mark of a paragraph that is not wrapped)

from __future__ import annotations

import ast
import functools
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import typer

from lvtrain.errors import one_line_errors

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


def signatures() -> dict[str, Callable[..., None]]:
    """For each subject, a function with the arguments and the docstring of its `run`, and an empty body.

    They are taken from the source text, because the modules import torch and `--help` must answer at once. A default
    may be a literal or a constant of its module.
    """
    found = {}
    for path in sorted((Path(__file__).parent / "benchmarks").glob("*.py")):
        tree = ast.parse(path.read_text())
        constants = {
            node.targets[0].id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Constant)
        }
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == "run":
                node.args.defaults = [
                    constants.get(default.id, default) if isinstance(default, ast.Name) else default
                    for default in node.args.defaults
                ]
                node.body = node.body[:1]  # the docstring
                names: dict[str, Any] = {"Any": Any, "Path": Path}
                exec(compile(ast.Module([node], []), str(path), "exec"), names)
                found[path.stem] = names["run"]
    return found


def _module(name: str) -> Any:
    return importlib.import_module(f"tools.benchmarks.{name}")


def _command(name: str, signature: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(signature)
    def command(**options: Any) -> None:
        with one_line_errors("benchmark"):
            typer.echo(json.dumps(_module(name).run(**options), indent=1))

    command.__annotations__ = get_type_hints(signature)
    return command


@app.command("all")
def run_all() -> None:
    """Runs every subject at a size that takes seconds, and prints one JSON object."""
    modules = {name: _module(name) for name in signatures()}
    found = {name: module.run(**module.SMALL) for name, module in modules.items() if hasattr(module, "SMALL")}
    typer.echo(json.dumps(found, indent=1))


for _name, _signature in signatures().items():
    app.command(_name)(_command(_name, _signature))

if __name__ == "__main__":
    app()
