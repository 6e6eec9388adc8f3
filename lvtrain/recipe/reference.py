"""The page of all recipe keys, `REFERENCE.md`, from the fields. `python tools/recipe_reference.py` writes it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from enum import Enum
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lvtrain.recipe.base import Duration, Section
from lvtrain.recipe.fields import Key, all_keys

PAGE = Path(__file__).with_name("REFERENCE.md")

_INTRODUCTION = """# Recipe keys

Every key of a recipe. `python tools/recipe_reference.py` writes this page from the fields in
`lvtrain/recipe` and in the files of methods, margins, optimizers and trackers.

On the command line a key is written with dots: `optimizer.lr=1e-4`, `phases.0.sample_rate=0.1`. A
phase can also be given by its name: `phases.alignment.sample_rate=0.1`. `phases.*.sample_rate=0.1`
sets the key of every phase.

"Of training" in the column of units means a duration: a number with a unit, such as `500 steps`,
`20 epochs` or `1e6 samples`.

**On a resume** says whether a later start of the same run may change the key:

- *free*: yes.
- *reported*: yes. The log and `events.jsonl` say what changed and at which step.
- *fixed*: no. To change it, start a new run with another `name`, from the old run's weights
  (`init_from`).
"""
_HEADER = "| key | default | unit or values | meaning | on a resume |\n|---|---|---|---|---|"


def page() -> str:
    """The whole page."""
    keys = all_keys()
    parts = [_INTRODUCTION]
    for top, group in groupby(keys, key=lambda key: _top(key.dotted)):
        members = list(group)
        parts.append(f"## {top}\n\n{_table(key for key in members if not key.named)}")
        for place, names, shared in _by_name(members):
            parts.append(f"### {place}: {', '.join(names)}\n\n{_table(shared)}")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _by_name(keys: list[Key]) -> list[tuple[str, list[str], list[Key]]]:
    """The keys of named sections as (place, names that have them, keys): a key that several names share comes once."""
    names: dict[str, list[str]] = defaultdict(list)
    first: dict[str, Key] = {}
    for key in keys:
        if key.named:
            names[_row(key)].append(key.named)
            first.setdefault(_row(key), key)
    grouped: dict[tuple[str, str], tuple[str, list[str], list[Key]]] = {}
    for row, key in first.items():
        place = _parent(key.dotted)
        grouped.setdefault((place, str(names[row])), (place, names[row], []))[2].append(key)
    return list(grouped.values())


def _top(dotted: str) -> str:
    return dotted.partition(".")[0] if "." in dotted else "The run"


def _parent(dotted: str) -> str:
    return dotted.rpartition(".")[0].replace(".*", "").removesuffix(".distill").removesuffix(".mixup")


def _table(keys: Iterable[Key]) -> str:
    return "\n".join([_HEADER, *map(_row, keys)])


def _row(key: Key) -> str:
    return (
        f"| `{key.dotted}` | {_default(key.field)} | {_unit(key.field)} | {_cell(key.field.description or '')} "
        f"| {key.rule if key.rule != 'fixed' or not key.because else f'fixed: {_cell(key.because)}'} |"
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is not PydanticUndefined:
        return _value(field.default)
    factory: Any = field.default_factory
    return "see meaning" if field.default_factory_takes_validated_data else _value(factory())


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return _cell(f"[{', '.join(_value(element) for element in value)}]")
    if isinstance(value, Section):
        return _cell(str(getattr(value, "name", "")))
    if isinstance(value, Enum):
        return _cell(str(value.value))
    return _cell(f"{value:g}" if isinstance(value, float) else "{}" if value == {} else str(value))


def _unit(field: FieldInfo) -> str:
    extra: Any = field.json_schema_extra or {}
    if unit := extra.get("unit"):
        return _cell(unit)
    annotations = [field.annotation, *get_args(field.annotation)]
    if any(part is Duration or Duration in get_args(part) for part in annotations):
        return "of training"
    choices = [choice for part in annotations if get_origin(part) is Literal for choice in get_args(part)]
    return _cell(", ".join(map(str, choices)) if len(choices) > 1 else "")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
