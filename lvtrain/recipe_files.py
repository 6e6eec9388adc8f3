"""A recipe's way in and out: YAML and `section.key=value` overrides in, `recipe.yaml` of the run folder out, and what a mistake is called.

Every mistake is a `UserError` of one line with the dotted key; an unknown key comes with the nearest valid one. Knows nothing of torch.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from lvtrain.errors import UserError
from lvtrain.recipe import MethodSection, Recipe, Section


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe, apply overrides such as `schedule.total="10 steps"` or `phases.0.sample_rate=0.5`, validate.

    Raises UserError, one line, for a missing file, bad YAML, an unknown key (with the nearest valid one) or a bad value.
    """
    path = Path(path)
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in (Path(__file__).parent / "recipes").glob("*.yaml")))
        raise UserError(f"recipe {path} does not exist; lvtrain/recipes has {known}")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {path} must be a mapping of sections, not {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return resolve(values, source=str(path))


def resolve(values: dict[str, Any], *, source: str = "recipe") -> Recipe:
    """Validate a plain dict as a recipe; raises UserError, one line naming the dotted key."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(_explain(problem) for problem in error.errors())) from error


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, which `load` reads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _apply(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"override {override!r} must look like section.key=value")
    try:
        value = _parse_scalar(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not valid YAML") from error
    node: Any = values
    *parents, last = dotted.split(".")
    for name in parents:
        node = _child(node, name, override)
    if isinstance(node, list):
        node[_position(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"override {override!r}: {'.'.join(parents)} is a value, not a section")


def _parse_scalar(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _child(node: Any, name: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_position(node, name, override)]
    if not isinstance(node, dict):
        raise UserError(f"override {override!r}: {name} lies below a value, not a section")
    if node.get(name) is None:
        node[name] = {}
    return node[name]


def _position(node: list[Any], name: str, override: str) -> int:
    """An element of a list by number, or by its `name` (phases.alignment.sample_rate)."""
    for position, element in enumerate(node):
        if name == str(position) or (isinstance(element, dict) and element.get("name") == name):
            return position
    raise UserError(f"override {override!r}: the list has no element {name!r}")


def _explain(problem: Any) -> str:
    location = [part for part in problem["loc"] if part not in _discriminators()]
    dotted = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        valid = _valid_keys(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"valid keys here: {', '.join(valid)}"
        return f"unknown key {dotted!r}; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    got = f", got {problem['input']!r}" if isinstance(problem.get("input"), (str, int, float, bool)) else ""
    return f"{dotted or 'recipe'}: {message}{got}" if problem["type"] != "missing" else f"{dotted} is missing"


def _models(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)] if get_origin(annotation) else []


def _discriminators() -> set[str]:
    return {str(model.model_fields["name"].default) for model in _models(MethodSection)}


def _valid_keys(location: list[Any]) -> list[str]:
    models: list[type[Section]] = [Recipe]
    for part in location:
        if isinstance(part, int):
            continue
        models = [
            below
            for model in models
            if part in model.model_fields
            for below in _models(model.model_fields[part].annotation)
        ]
    return sorted({name for model in models for name in model.model_fields})
