"""The recipe's fields: how many there are, that each is described, and that the page of all keys is up to date."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lvtrain.recipe import files as recipes
from lvtrain.recipe.fields import all_keys
from lvtrain.recipe.reference import PAGE, page

RECIPES = sorted((Path(recipes.__file__).parents[1] / "recipes").glob("*.yaml"))
MOST_KEYS = 70  # besides the method; 84 in version 0.1.0


def common_keys() -> set[str]:
    """The keys of every recipe; those of one method, margin, optimizer or tracker are its own."""
    return {key.dotted for key in all_keys() if not key.named and not key.dotted.startswith("method.")}


def test_there_are_not_too_many_keys() -> None:
    keys = common_keys()
    assert len(keys) <= MOST_KEYS, sorted(keys)


def test_every_key_is_described() -> None:
    assert [key.dotted for key in all_keys() if not key.field.description] == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_keys_of_a_recipe_are_among_them(path: Path) -> None:
    """The walk finds what pydantic takes."""

    def keys(values: object, prefix: str = "") -> set[str]:
        if isinstance(values, dict) and values:
            return {key for name, below in values.items() for key in keys(below, f"{prefix}.{name}")}
        if isinstance(values, list) and any(isinstance(element, dict) for element in values):
            return {key for element in values for key in keys(element, f"{prefix}.*")}
        return {prefix.removeprefix(".")} if values is not None else set()

    known = {key.dotted for key in all_keys()}
    free_form = ("backbone.overrides.", "evaluation.benchmarks.")
    resolved = yaml.safe_load(recipes.dump(recipes.load(path)))
    assert {key for key in keys(resolved) if not key.startswith(free_form)} <= known


def test_the_page_of_all_keys_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run: python tools/recipe_reference.py"


def test_the_page_has_every_key_with_its_rule() -> None:
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    found = {row[0].strip("| `"): row[-1].strip(" |").partition(":")[0] for row in rows}
    assert found.keys() == {key.dotted for key in all_keys()}
    assert (found["optimizer.lr"], found["seed"], found["logging.every"]) == ("reported", "fixed", "free")
