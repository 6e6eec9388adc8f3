"""Reads recipes from YAML and `section.key=value` overrides, and writes the `recipe.yaml` of a run folder.

Every mistake is a `UserError` of one line with the dotted key and its source: the file or an override. For an unknown key
the line gives its new name, its name in lvtrain, or the nearest valid key.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from lvtrain.errors import UserError
from lvtrain.recipe import arcface_torch, old_keys, strict_yaml
from lvtrain.recipe.base import Section
from lvtrain.recipe.fields import all_keys, plain_sections
from lvtrain.recipe.registry import section_by_name
from lvtrain.recipe.sections import Recipe

_MOST_MISTAKES = 6


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Reads a recipe, and applies overrides such as `schedule.total="10 steps"` or `phases.0.sample_rate=0.5`.

    `phases.*.sample_rate=0.5` sets the key of every phase.

    Raises:
        UserError: a missing file, bad YAML, an unknown key or a bad value.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"recipe {path} does not exist; {_nearest_recipe(path.stem)}")
    try:
        values = strict_yaml.parse_yaml(strict_yaml.read_small(path))
    except strict_yaml.StrictError as error:
        raise UserError(f"recipe {path}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {path} must be a mapping of sections, not {type(values).__name__}")
    alone = copy.deepcopy(values)
    places = {each: apply(values, each) for override in overrides for each in _for_each_element(values, override)}
    own = None  # the file's own mistakes, looked for only when there are any

    def source(problem: Any) -> str:
        """The overrides that set the wrong value or a part of it; the file, if it was wrong without them."""
        nonlocal own
        own = _problems(alone) if own is None else own
        key = _location(problem)
        blamed = [override for override, place in places.items() if all(a == b for a, b in zip(place, key))]
        if not blamed or (key, problem["type"]) in own:
            return f"recipe {path}"
        return f"override{'s' if len(blamed) > 1 else ''} {', '.join(map(repr, blamed))}"

    return resolve(values, source=source)


def _nearest_recipe(name: str) -> str:
    known = sorted(path.stem for path in (Path(__file__).parents[1] / "recipes").glob("*.yaml"))
    if near := difflib.get_close_matches(name, known, n=1):
        return f"did you mean lvtrain/recipes/{near[0]}.yaml?"
    return "lvtrain/recipes/README.md lists the recipes of lvtrain"


def resolve(values: dict[str, Any], *, source: Callable[[Any], str] = lambda problem: "recipe") -> Recipe:
    """Checks plain values as a recipe.

    Args:
        values: the recipe, as YAML gives it.
        source: returns the source of a pydantic problem: the file or an override.

    Raises:
        UserError: one line with each mistake's source and dotted key.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = error.errors()
        mistakes = [f"{source(problem)}: {_explain(problem, values)}" for problem in problems[:_MOST_MISTAKES]]
        more = [f"and {len(problems) - len(mistakes)} more mistakes"] if len(problems) > len(mistakes) else []
        theirs = sum(
            arcface_torch.answer(str(problem["loc"][-1])) is not None for problem in problems if problem["loc"]
        )
        if theirs > 2:
            more.append("python tools/migrate_config.py CONFIG.py writes a recipe from a file of arcface_torch")
        raise UserError("; ".join(mistakes + more)) from error


def _problems(values: dict[str, Any]) -> set[tuple[tuple[Any, ...], str]]:
    try:
        Recipe.model_validate(values)
    except ValidationError as error:
        return {(_location(problem), problem["type"]) for problem in error.errors()}
    return set()


def of_run(text: str) -> dict[str, Any]:
    """The plain values of a run folder's `recipe.yaml`, with today's keys, whatever version wrote it."""
    try:
        values = strict_yaml.parse_yaml(text)
    except strict_yaml.StrictError as error:
        raise UserError(f"recipe.yaml of the run: {error}") from error
    if not isinstance(values, dict):
        raise UserError("recipe.yaml of the run is empty or not a recipe; take it from the newest checkpoint's run")
    return old_keys.translate(values)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, which `load` reads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _for_each_element(values: dict[str, Any], override: str) -> list[str]:
    """`phases.*.key=value` as one override for each phase."""
    before, star, after = override.partition(".*.")
    if not star or "=" in before:
        return [override]
    elements = values.get(before)
    if not isinstance(elements, list):
        raise UserError(f"override {override!r}: {before} is not a list in this recipe")
    return [f"{before}.{number}.{after}" for number in range(len(elements))]


def apply(values: dict[str, Any], override: str) -> tuple[Any, ...]:
    """Applies an override to `values`. Returns its place as in a validation error (list elements by number)."""
    dotted, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"override {override!r} must look like section.key=value")
    try:
        value = _parse_scalar(text)
    except strict_yaml.StrictError as error:
        raise UserError(f"override {override!r}: the value: {error}") from error
    node: Any = values
    place: list[Any] = []
    last: Any
    *parents, last = dotted.split(".")
    for name in parents:
        key = _position(node, name, override) if isinstance(node, list) else name
        field = _fields(tuple(place), values).get(str(key))
        if isinstance(node, dict) and isinstance(node.get(key), str) and field and (bare := _bare(field)):
            node[key] = {bare: node[key]}
        place.append(key)
        node = _child(node, key, override)
    if isinstance(node, list):
        last = _position(node, last, override)
    elif not isinstance(node, dict):
        raise UserError(f"override {override!r}: {'.'.join(parents)} is a value, not a section")
    node[last] = value
    return (*place, last)


def _parse_scalar(text: str) -> Any:
    value = strict_yaml.parse_yaml(text)
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _child(node: Any, name: Any, override: str) -> Any:
    if isinstance(node, list):
        return node[name]
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


def _explain(problem: Any, values: dict[str, Any]) -> str:
    location = _location(problem)
    dotted = ".".join(str(part) for part in location)
    fields = _fields(location[:-1], values)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {dotted!r}; {_hint(location, sorted(fields))}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{dotted} is missing"
    if problem["type"] == "path_type" and problem["input"] is None:
        return f"{dotted} has no value; YAML needs a space after the colon, 'name: path'"
    if problem["type"] == "unknown_name":
        return f"{dotted}: {problem['msg']}" + arcface_torch.answer_value(dotted, problem["input"])
    got = f", got {problem['input']!r}" if isinstance(problem.get("input"), (str, int, float, bool)) else ""
    meant = (
        fields[location[-1]].description if location and location[-1] in fields and message == problem["msg"] else None
    )
    return f"{dotted or 'recipe'}: {message}{got}" + (f" ({meant})" if meant else "")


def _hint(location: tuple[Any, ...], valid: list[str]) -> str:
    key = str(location[-1])
    if renamed := old_keys.answer(location):
        return renamed
    if theirs := arcface_torch.answer(key):
        return theirs
    elsewhere = [one for one in all_keys() if one.dotted.rpartition(".")[2] == key]
    here = ".".join("*" if isinstance(part, int) else str(part) for part in location)
    if owners := [one.named for one in elsewhere if one.dotted == here]:
        return f"only {' and '.join(owners)} has it; valid keys here: {', '.join(valid)}"
    if places := _places_of(key):
        return f"did you mean {' or '.join(places[:3])}?"
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"valid keys here: {', '.join(valid)}"


def _places_of(key: str) -> list[str]:
    """The dotted keys and sections whose last part is `key`."""
    found = [one.dotted.split(".") for one in all_keys()]
    return list(
        dict.fromkeys(".".join(parts[: parts.index(key) + 1]).replace("*", "0") for parts in found if key in parts)
    )


def _location(problem: Any) -> tuple[Any, ...]:
    return tuple(problem["loc"])


def _fields(location: tuple[Any, ...], values: Any) -> dict[str, FieldInfo]:
    """The fields that may stand at a place of the recipe `values`, by key."""
    models: list[type[Section]] = [Recipe]
    found: list[FieldInfo] = []
    recipe = values
    for part in location:
        values = _inside(values, part)
        if not isinstance(part, int):  # else an element of the field before
            found = [model.model_fields[part] for model in models if part in model.model_fields]
        models = [model for field in found for model in _sections(field, values, recipe)]
    return {name: field for model in models for name, field in model.model_fields.items()}


def _sections(field: FieldInfo, value: Any, recipe: Any) -> list[type[Section]]:
    if named := section_by_name(field):
        section = named.of(value, recipe)
        return [section] if section else []
    return plain_sections(field.annotation)


def _bare(field: FieldInfo) -> str:
    """The key that a bare value of the field sets: `method: pco` is short for `method: {name: pco}`."""
    mark = section_by_name(field)
    return (
        "name" if mark and mark.has_own_name else next((model.bare for model in plain_sections(field.annotation)), "")
    )


def _inside(values: Any, part: Any) -> Any:
    try:
        return values[part]
    except (KeyError, IndexError, TypeError):
        return None
