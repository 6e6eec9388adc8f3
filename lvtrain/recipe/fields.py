"""Every key of a recipe, found by walking the sections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from lvtrain.recipe.base import Rule, Section
from lvtrain.recipe.registry import SectionByName, section_by_name
from lvtrain.recipe.sections import Recipe


@dataclass(frozen=True)
class Key:
    """One key, such as `phases.*.end.cos2`; `*` is an element of a list.

    Attributes:
        field: its default, description and bounds.
        rule: whether a resume may change it.
        because: why a resume may not.
        named: the entry of a named section that has it, such as "sgd"; empty where all entries have it.
    """

    dotted: str
    field: FieldInfo
    rule: Rule
    because: str
    named: str = ""


def all_keys() -> list[Key]:
    """Every key that holds a value, in the order of the sections."""
    return list(_keys(Recipe, "", "fixed", "", ""))


def sections_of(field: FieldInfo) -> dict[str, type[Section]]:
    """Every section that a field may hold, by the name that chooses it ("" where there is no choice)."""
    if named := section_by_name(field):
        return named.sections()
    return {"": plain[0]} if (plain := plain_sections(field.annotation)) else {}


def plain_sections(annotation: Any) -> list[type[Section]]:
    """The sections in a type such as `list[Phase]` or `Ema | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for part in get_args(annotation) for found in plain_sections(part)] if get_origin(annotation) else []


def rule_of(field: FieldInfo, above: tuple[Rule, str]) -> tuple[Rule, str]:
    """Whether a resume may change a field, and why not. What the field does not say is as in the section above."""
    extra: Any = field.json_schema_extra
    extra = extra if isinstance(extra, dict) else {}
    return extra.get("resume", above[0]), extra.get("because", above[1])


def _keys(model: type[Section], prefix: str, rule: Rule, because: str, named: str) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        own = rule_of(field, (rule, because))
        sections = sections_of(field)
        if not sections:
            yield Key(prefix + name, field, *own, named)
        below = f"{prefix}{name}.*." if get_origin(field.annotation) is list else f"{prefix}{name}."
        shared = set.intersection(*(set(section.model_fields) for section in sections.values())) if sections else set()
        seen: set[str] = set()
        for choice, section in sections.items():
            for key in _keys(section, below, *own, choice or named):
                if not choice or key.dotted.removeprefix(below).partition(".")[0] not in shared:
                    yield key
                elif key.dotted not in seen:  # once, for all entries together
                    seen.add(key.dotted)
                    mark = section_by_name(field) if key.dotted == below + "name" else None
                    yield replace(_name_key(key, mark) if mark and mark.has_own_name else key, named=named)


def _name_key(key: Key, named: SectionByName) -> Key:
    """The key `name` of a named section, which each entry declares with its own name only."""
    default = named.default if named.default is not None else ...
    description = f"name of the {named.registry.kind}: {', '.join(named.registry.names())}"
    return replace(key, field=FieldInfo(default=default, description=description))
