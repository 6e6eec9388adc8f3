"""Benchmarks, each printing JSON. The same commands run on a CPU and on a GPU.

\b
python tools/benchmark.py backbone --name vit_l --batch 384
python tools/benchmark.py step --name vit_s --batch 384 --classes 360232
python tools/benchmark.py allpairs --images 200000
python tools/benchmark.py all

A subject is a module of `tools/benchmarks` with a function `run(...) -> dict`
whose arguments become the options, and `SMALL`, with which `all` takes seconds.
"""

from __future__ import annotations

import functools
import importlib
import json
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import typer

from lvtrain.errors import EXIT_ERROR, UserError

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


def subjects() -> dict[str, Any]:
    """The modules of `tools/benchmarks` that have something to run, by name."""
    folder = Path(__file__).parent / "benchmarks"
    modules = {
        found.name: importlib.import_module(f"tools.benchmarks.{found.name}")
        for found in pkgutil.iter_modules([str(folder)])
    }
    return {name: module for name, module in modules.items() if hasattr(module, "run")}


def _command(run: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    @functools.wraps(run)
    def command(**options: Any) -> None:
        try:
            typer.echo(json.dumps(run(**options), indent=1))
        except UserError as error:
            typer.echo(f"benchmark: error: {error}", err=True)
            raise typer.Exit(EXIT_ERROR) from error

    command.__annotations__ = get_type_hints(run)
    return command


@app.command("all")
def run_all() -> None:
    """Every subject at a size that takes seconds, as one JSON object."""
    typer.echo(
        json.dumps(
            {name: module.run(**module.SMALL) for name, module in subjects().items() if hasattr(module, "SMALL")},
            indent=1,
        )
    )


for _name, _module in subjects().items():
    app.command(_name)(_command(_module.run))

if __name__ == "__main__":
    app()
