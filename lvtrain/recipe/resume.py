"""What another start of the same run may change, as the recipe's fields say (`setting(..., resume=...)`)."""

from __future__ import annotations

from collections.abc import Iterator

from lvtrain.recipe.base import Rule, Section
from lvtrain.recipe.fields import rule_of, sections_of
from lvtrain.recipe.sections import Recipe

_STRICTEST: tuple[Rule, ...] = ("fixed", "reported", "free")


def resume_rule(dotted: str) -> Rule:
    """`free`, `reported` or `fixed`, for a key such as `phases.0.end.cos2` or `evaluation.benchmarks.lfw`.

    Where methods share a key, the strictest of their rules. A key that is unknown is fixed.
    """
    rules = {rule for rule, _ in _found(dotted)}
    return next((rule for rule in _STRICTEST if rule in rules), "fixed")


def resume_reason(dotted: str) -> str:
    """Why the key is fixed, as the end of a sentence; empty where its field says nothing."""
    return next((because for rule, because in _found(dotted) if rule == "fixed" and because), "")


def _found(dotted: str) -> list[tuple[Rule, str]]:
    parts = [part for part in dotted.split(".") if not part.isdigit()]
    return list(_walk(Recipe, parts, "fixed", ""))


def _walk(model: type[Section], parts: list[str], rule: Rule, because: str) -> Iterator[tuple[Rule, str]]:
    """The rule of every field that the key may mean. What a field does not say is as in the section that holds it."""
    if not parts or parts[0] not in model.model_fields:
        return
    field = model.model_fields[parts[0]]
    rule, because = rule_of(field, (rule, because))
    below = sections_of(field).values()
    if len(parts) == 1 or not below:  # the field itself, or a key of a dict in it
        yield rule, because
    for section in below:
        yield from _walk(section, parts[1:], rule, because)
