"""The keys of a margin in a recipe, and what a mistake in them is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from lvtrain.errors import UserError
from lvtrain.recipe import files as recipes

QUICKSTART = Path(recipes.__file__).parents[1] / "recipes" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("classifier.margin.momemtum=0.9", ["'classifier.margin.momemtum'", "scale"]),
        (
            "classifier.margin={name: adaface, momemtum: 0.9}",
            ["'classifier.margin.momemtum'", "'momentum'"],
        ),
        ("classifier.margin={name: adaface, h: -1}", ["classifier.margin.h: ", "-1"]),
        ("classifier.margin={name: arcfase}", ["classifier.margin: ", "'arcfase'", "'arcface'"]),
        ("classifier.margin={m: [1]}", ["classifier.margin.m: "]),
        ("classifier.margin.warmup=3 samples", ["classifier.margin.warmup: "]),
        ("classifier.margin=3", ["classifier.margin: "]),
        ("classifier.numerics=turbo", ["classifier.numerics.preset: ", "'exact'", "'fast'", "'turbo'"]),
        ("classifier.numerics.keep=9", ["'classifier.numerics.keep'", "'keep_mb'"]),
    ],
)
def test_a_mistake_is_one_line_with_the_dotted_key(override: str, named: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        recipes.load(QUICKSTART, [override])
    line = str(caught.value)
    assert all(part in line for part in named) and "\n" not in line and override in line, line


def test_a_bare_name_takes_further_keys_from_overrides() -> None:
    recipe = recipes.load(
        QUICKSTART,
        [
            "classifier.margin=adaface",
            "classifier.margin.h=0.2",
            "classifier.numerics=fast",
            "classifier.numerics.keep_mb=5",
        ],
    )
    assert recipe.classifier is not None
    margin, numerics = recipe.classifier.margin, recipe.classifier.numerics
    assert (margin.name, margin.model_dump()["h"], margin.model_dump()["m"]) == ("adaface", 0.2, 0.4)
    assert (numerics.preset, numerics.precision, numerics.keep_mb) == ("fast", "half", 5.0)


@pytest.mark.parametrize("name", ["cosface", "arcface", "combined", "adaface"])
def test_what_is_written_is_read_back(name: str, tmp_path: Path) -> None:
    recipe = recipes.load(QUICKSTART, [f"classifier.margin={{name: {name}, scale: 32}}"])
    (tmp_path / "again.yaml").write_text(recipes.dump(recipe))
    assert recipes.load(tmp_path / "again.yaml") == recipe
