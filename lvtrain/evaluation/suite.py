"""Several benchmarks of several protocols for one model: what training calls, and what `tools/evaluate.py` calls.

A benchmark is written `NAME:PATH`, or `NAME:PROTOCOL:PATH` where the path alone does not say which protocol is meant. A
recipe writes `name: path`, or `name: {protocol: …, path: …, and the protocol's options}`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lvtrain.errors import UserError
from lvtrain.evaluation.protocol import PROTOCOLS, Grouped, Setting, Task
from lvtrain.weights import extract


def create_task(name: str, path: str | Path, kind: str | None = None, options: Mapping[str, Any] | None = None) -> Task:
    """One benchmark. `path` may name several paths, separated by commas, where the protocol takes several.

    Raises:
        UserError: a path that does not exist or that no protocol recognises, an unknown protocol or option.
    """
    protocol = PROTOCOLS.get(kind) if kind else None
    parts = str(path).split(",") if protocol and protocol.paths > 1 else [str(path)]
    paths = tuple(map(Path, parts))
    if protocol and len(paths) != protocol.paths:
        raise UserError(f"benchmark {name}: {kind} takes {protocol.paths} paths, got {path}")
    for found in paths:
        if not found.exists():
            raise UserError(f"benchmark {name}: {found} does not exist; correct the path")
    if kind is None:
        matching = {entry: cls for entry, cls in PROTOCOLS.entries().items() if cls.matches(paths[0])}
        fitting = [entry for entry, cls in matching.items() if not cls.fallback] or list(matching)
        if len(fitting) != 1:
            known = ", ".join(PROTOCOLS.names())
            raise UserError(f"benchmark {name}: {path} fits {len(fitting)} protocols; name one of {known}")
        kind = fitting[0]
    try:
        chosen = PROTOCOLS.get(kind).options_class.model_validate(dict(options or {}))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"benchmark {name}, options of {kind}: {wrong}") from error
    return Task(name, kind, paths, chosen)


def parse(text: str, options: Mapping[str, Mapping[str, Any]] | None = None) -> Task:
    """`PATH`, `NAME:PATH` or `NAME:PROTOCOL:PATH`; `options` are those of each protocol, by its name."""
    name, _, rest = text.partition(":") if ":" in text else (Path(text).stem, "", text)
    kind, colon, path = rest.partition(":")
    if not colon or kind not in PROTOCOLS.names():
        kind, path = "", rest
    task = create_task(name, path, kind or None)
    return create_task(name, path, task.kind, (options or {}).get(task.kind))


def evaluate(
    forward: extract.Forward,
    tasks: Sequence[Task],
    setting: Setting,
    *,
    say: Callable[[str], None] = lambda text: None,
    refused: dict[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Results by task name, JSON values with their `kind`, the same on every rank. A collective.

    Protocols that follow each other on one labelled set share its embeddings. With `refused`, the error of a task is put
    there by task name, and the other tasks continue.

    Raises:
        UserError: two tasks of one name, or whatever a protocol refuses.
    """
    names = [task.name for task in tasks]
    if len(set(names)) != len(names):
        raise UserError(f"names of benchmarks must differ, got {', '.join(names)}; choose another NAME in NAME:PATH")
    setting = replace(setting, kept={})
    results = {}
    for task in tasks:
        protocol = PROTOCOLS.get(task.kind)
        say(f"{task.name}: {protocol.title} on {' and '.join(map(str, task.paths))}")
        try:
            results[task.name] = {"kind": task.kind, **protocol(task.options).run(forward, task.paths, setting)}
        except UserError as error:
            if refused is None:
                raise
            refused[task.name] = str(error)
    return results


def with_groups(tasks: Sequence[Task], words: Sequence[str]) -> list[Task]:
    """The tasks with their table of groups. A word is `FILE`, for every 1:1 benchmark, or `NAME:FILE`, for one.

    Raises:
        UserError: a file that does not exist, a name of no benchmark, or a benchmark that does not compare one to one.
    """
    found = {task.name: task for task in tasks}
    for word in words:
        name, colon, file = word.partition(":")
        chosen = [name] if colon and name in found else list(found)
        path = Path(file if colon and name in found else word)
        if not path.is_file():
            raise UserError(
                f"--groups {word}: {path} does not exist; give FILE or NAME:FILE with the NAME of a benchmark"
            )
        fitting = [one for one in chosen if isinstance(found[one].options, Grouped)]
        if not fitting:
            kinds = sorted(kind for kind, cls in PROTOCOLS.entries().items() if issubclass(cls.options_class, Grouped))
            raise UserError(
                f"--groups {word}: none of {', '.join(chosen)} is of a protocol with groups: {', '.join(kinds)}"
            )
        for one in fitting:
            options = found[one].options.model_copy(update={"groups": path})
            found[one] = replace(found[one], options=options)
    return list(found.values())


def run_benchmarks(
    forward: extract.Forward, benchmarks: Mapping[str, Any], setting: Setting
) -> dict[str, dict[str, Any]]:
    """Results of a recipe's `evaluation.benchmarks` by name, the same on every rank. A collective.

    Args:
        forward: normalised float32 [b, 3, H, W] -> [b, d]. Every rank calls it equally often, so it may be a collective.
        benchmarks: by name, a path or `{protocol, path, options}`.
        setting: how images are embedded.

    Raises:
        UserError: a benchmark that cannot be read, an image that cannot be decoded, embeddings that are not finite.
    """
    return evaluate(forward, recipe_tasks(benchmarks), setting)


def recipe_tasks(benchmarks: Mapping[str, Any]) -> list[Task]:
    """The tasks of a recipe's `evaluation.benchmarks`.

    Raises:
        UserError: as `create_task`.
    """
    tasks = []
    for name, value in benchmarks.items():
        options = dict(value) if isinstance(value, Mapping) else {"path": value}
        path, kind = options.pop("path", None), options.pop("protocol", None)
        if path is None:
            raise UserError(f"evaluation.benchmarks.{name} needs a path")
        try:
            tasks.append(create_task(name, path, kind, options))
        except UserError as error:
            what = str(error).removeprefix(f"benchmark {name}: ")
            raise UserError(f"evaluation.benchmarks.{name}: {what}") from error
    return tasks


def figure(result: dict[str, Any]) -> float:
    """The number in [0, 1] of a result that training follows."""
    return PROTOCOLS.get(result["kind"]).figure(result)


def headline(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What a table shows of one result: (figure, value) pairs, the most important first."""
    return PROTOCOLS.get(result["kind"]).headline(result)
